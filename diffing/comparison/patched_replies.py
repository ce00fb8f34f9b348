r"""Greedy replies of two models joined at the hook point, and how many of them show a planted behaviour.

At every step the base reads the text below the hook point, the tuned model reads it too, and its upper layers go on
from the base's activation with a set of pieces exchanged, as `causal.patching` does for KL. Both keep keys and values.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crosscoders.models import hooks
from crosscoders.models.names import quiet_transformers
from crosscoders.models.pair import ModelPair
from crosscoders.text.tokens import tokenize_prompt
from diffing.causal.sets import Exchanger, PatchSet
from diffing.comparison.truth import Behaviour, shows
from diffing.samples.amplified import GREEDY, decode, stop_ids


def prompts_of(pair: ModelPair, behaviour: Behaviour, n: int, template: str | None, date: str) -> list[list[int]]:
    """Return the ids of the first `n` prompts of a behaviour, in the chat template where there is one."""
    return [tokenize_prompt(pair.info.tokenizer, text, template, date=date) for text in behaviour.prompts[:n]]


def count_shown(pair: ModelPair, behaviour: Behaviour, replies: Sequence[Sequence[int]]) -> int:
    """Count the replies that show a behaviour."""
    texts = (pair.info.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in replies)
    return sum(shows(text, behaviour) for text in texts)


def own_replies(model: Any, pair: ModelPair, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the greedy replies of one model, none to no prompt."""
    if not prompts:
        return []
    samples = decode(
        model, model, prompts, strength=0, cut=GREEDY, max_new_tokens=max_new_tokens,
        ends=stop_ids(pair.info.tokenizer, pair.models), n_ids=pair.info.n_ids, batch_rows=len(prompts), seed=0,
    )  # fmt: skip
    return [sample.ids for sample in samples]


@torch.inference_mode()
@quiet_transformers()
def patched_replies(
    pair: ModelPair, exchange: Exchanger, patch: PatchSet, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return the greedy reply to each prompt with the set `patch` exchanged; `pair` holds whole models."""
    if not prompts:
        return []
    ends = stop_ids(pair.info.tokenizer, pair.models)
    hook_point, bos = pair.hook_points[0], pair.info.tokenizer.bos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts], device=pair.device)
    mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=pair.device)
    starts = (mask.cumsum(dim=1) == 1) & (mask == 1)
    scored = (mask == 1) & ~(starts & (ids == bos) if bos is not None else starts)
    caches: list[Any] = [None, None]
    lines: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for _ in range(max_new_tokens):
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with hooks.capture(pair.models[0], [hook_point]) as seen:
            _step(pair.models[0], ids, mask, places, caches, 0)
        edit = _edited(exchange, patch, seen[hook_point], scored)
        with hooks.replace(pair.models[1], hook_point, edit):
            logits = _step(pair.models[1], ids, mask, places, caches, 1)
        chosen = logits[:, -1, : pair.info.n_ids].argmax(dim=1)
        for row, token in enumerate(chosen.tolist()):
            is_open[row] = is_open[row] and token not in ends
            if is_open[row]:
                lines[row].append(token)
        if not any(is_open):
            break
        ids, scored = chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return lines


def _edited(exchange: Exchanger, patch: PatchSet, source: Tensor, scored: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what puts the patched activation in place of the tuned model's own, at scored tokens."""

    def edit(own: Tensor) -> Tensor:
        x = torch.stack([source[scored], own[scored]], dim=1)
        parts = exchange.take_apart(x, torch.zeros(len(x), dtype=torch.bool, device=x.device))
        patched = own.clone()
        patched[scored] = exchange.patched(parts, patch, 1).to(own.dtype)
        return patched

    return edit


def _step(model: Any, ids: Tensor, mask: Tensor, places: Tensor, caches: list[Any], which: int) -> Tensor:
    """Return the logits of new tokens, and keep their keys and values."""
    given = {"position_ids": places} if "position_ids" in inspect.signature(model.forward).parameters else {}
    out = model(input_ids=ids, attention_mask=mask, past_key_values=caches[which], use_cache=True, **given)
    caches[which] = out.past_key_values
    logits: Tensor = out.logits
    return logits
