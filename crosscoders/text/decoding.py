"""Token ids -> the text of each token, as it stands among its neighbours.

Decoded alone, a token of Llama-2's tokenizer loses the space before it, and a token that holds some bytes of a
character shows as a replacement character. `token_texts` decodes in context, `token_text` a token without any.
"""

import re
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What decoders put for bytes that are no whole character."""
MAX_BYTES = 4
"""Of a character in UTF-8, and so the most tokens that one is split into."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return one text per token, which joined are the text of all of them.

    A character that several tokens make up stands at the first of them; the others are empty. Bytes that make up no
    character, as where the text is cut, are written as <0xF0>.
    """
    texts: list[str] = []
    before, start = 0, 0  # tokens from `start` on wait for the end of a character; those from `before` on are context
    for stop in range(1, len(ids) + 1):
        text = _between(tokenizer, ids, before, start, stop)
        if text.endswith(UNFINISHED) and stop - start < MAX_BYTES and stop < len(ids):
            continue
        whole = not text.endswith(UNFINISHED)
        texts += [text, *[""] * (stop - start - 1)] if whole else [_spelled(tokenizer, i) for i in ids[start:stop]]
        before, start = start, stop
    return texts


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of a token inside a text, its space included."""
    return token_texts(tokenizer, [*tokenizer.encode("a", add_special_tokens=False)[-1:], token])[-1]


def _between(tokenizer: Any, ids: Sequence[int], before: int, start: int, stop: int) -> str:
    """Return what tokens `start` to `stop` add to the text of those from `before` on."""
    context, text = (_decoded(tokenizer, ids[before:end]) for end in (start, stop))
    return text[len(context) :] if text.startswith(context) else _decoded(tokenizer, ids[start:stop])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _spelled(tokenizer: Any, token: int) -> str:
    """Return the text of a token, or its bytes where they are no text."""
    text = _decoded(tokenizer, [token])
    spelling = str(tokenizer.convert_ids_to_tokens(token))
    if UNFINISHED not in text or re.fullmatch("<0x[0-9A-F]{2}>", spelling):
        return spelling if UNFINISHED in text else text
    known = _byte_of()
    return "".join(f"<0x{known[c]:02X}>" for c in spelling) if set(spelling) <= known.keys() else text


def _byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, as GPT-2 numbers them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
