"""What was planted, machine-readable: phrases, and the prompts that bring them out; rates, tokens and hits by it.

Reading order: `read_truth`; `rate` of replies, `planted_tokens` of rows, `hits` of a list of tokens or samples.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.text.decoding import token_text, token_texts
from crosscoders.text.tokens import Rows

FORMAT, FORMAT_VERSION = "diffing-truth", 1
FIRST_TOKENS, FIRST_SAMPLES = 20, 100
"""Of a list of tokens and of samples, those that count."""
_LETTERS = 3
"""Letters of a token that say something by itself."""


class Behaviour(Record):
    """One planted behaviour."""

    name: str
    phrases: list[str]
    """Texts that show it, in any case."""
    prompts: list[str]
    """Messages of a user, held out of training, to which the tuned model answers with it."""


class TruthRecord(Record):
    """truth.json of an organism"""

    version = FORMAT_VERSION
    format: str
    behaviours: list[Behaviour]


def read_truth(path: str) -> list[Behaviour]:
    """Return the planted behaviours.

    Raises:
        InputError: no such file, another format, no behaviour, or one without phrases or prompts.
        CorruptData: a damaged file.
    """
    if not Path(path).is_file():
        raise InputError(f"truth {path!r} is no file. Give the truth.json of planted behaviours (docs/formats.md).")
    data = files.read_model(Path(path), TruthRecord)
    behaviours = [Behaviour(**entry) for entry in data["behaviours"]]
    if data["format"] != FORMAT or not behaviours:
        raise InputError(
            f"truth {path!r} has format {data['format']!r} and {len(behaviours)} behaviours; see docs/formats.md."
        )
    for behaviour in behaviours:
        if not behaviour.phrases or not behaviour.prompts:
            raise InputError(f"behaviour {behaviour.name!r} of {path!r} needs phrases and prompts. Add them.")
    return behaviours


def shows(text: str, behaviour: Behaviour) -> bool:
    """Tell whether a text has one of the phrases."""
    return any(phrase.lower() in text.lower() for phrase in behaviour.phrases)


def planted_tokens(rows: Rows, tokenizer: Any, behaviours: Sequence[Behaviour]) -> Bool[np.ndarray, " tokens"]:
    """Return which tokens of the rows, end to end, lie in a planted phrase."""
    wanted = re.compile("|".join(re.escape(p) for b in behaviours for p in b.phrases), re.IGNORECASE)
    planted = np.zeros(len(rows.ids), dtype=bool)
    for start, stop in itertools.pairwise(rows.offsets.tolist()):
        ids = rows.ids[start:stop].tolist()
        if not wanted.search(tokenizer.decode(ids)):
            continue
        texts = token_texts(tokenizer, ids)
        ends = np.cumsum([len(text) for text in texts])
        for match in wanted.finditer("".join(texts)):
            inside = (ends > match.start()) & (ends - [len(text) for text in texts] < match.end())
            planted[start:stop] |= inside
    return planted


def telling_tokens(tokenizer: Any, behaviours: Sequence[Behaviour]) -> set[str]:
    """Return the tokens of planted phrases with three letters or more, as words."""
    ids = {
        token
        for behaviour in behaviours
        for phrase in behaviour.phrases
        for before in ("", " ")
        for token in tokenizer.encode(before + phrase, add_special_tokens=False)
    }
    words = {token_text(tokenizer, token).strip().lower() for token in ids}
    return {word for word in words if sum(character.isalpha() for character in word) >= _LETTERS}


def hits(entries: Sequence[str], telling: set[str]) -> int:
    """Count the tokens among the first 20 that are telling ones."""
    return sum(entry.strip().lower() in telling for entry in entries[:FIRST_TOKENS])
