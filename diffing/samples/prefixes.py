"""Prefixes that nobody chose: the first tokens that the base itself would write, bare and as a user's message.

In the order of their probability after BOS these are the commonest first tokens of the base's own samples.
"""

from typing import Any

import torch

from crosscoders.common.errors import InputError
from crosscoders.text.refusals import Refused
from crosscoders.text.tokens import tokenize_prompt

EXTRA = 4
"""Times as many tokens as are needed are looked at, as special ones and those without letters in the template go."""


def blind_prefixes(
    base: Any, tokenizer: Any, n: int, n_ids: int, *, template: str | None, date: str
) -> list[list[int]]:
    """Return the ids of `n` prompts: the commonest first tokens, and in the chat template, where there is one, half of
    the prompts with such a token as the user's message.

    Raises:
        InputError: the tokenizer has no token to begin with.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("the tokenizer has neither BOS nor EOS, so no text can begin. Give another --tokenizer.")
    with torch.inference_mode():
        logits = base(input_ids=torch.tensor([[start]], device=base.device)).logits[0, -1, :n_ids]
    special = set(tokenizer.all_special_ids)
    ranked = logits.float().topk(min(n_ids, EXTRA * n + len(special))).indices.tolist()
    first = [token for token in ranked if token not in special]
    has_template = template is not None or bool(tokenizer.chat_template)
    bare = [[start, token] for token in first[: n - n // 2 if has_template else n]]
    return bare + (_in_template(tokenizer, first, n // 2, template, date) if has_template else [])


def _in_template(tokenizer: Any, first: list[int], n: int, template: str | None, date: str) -> list[list[int]]:
    prompts: list[list[int]] = []
    for token in first:
        text = tokenizer.decode([token]).strip()
        try:
            ids = tokenize_prompt(tokenizer, text, template, date=date) if text else []
        except Refused:
            continue
        if ids and ids not in prompts:
            prompts.append(ids)
        if len(prompts) == n:
            break
    return prompts
