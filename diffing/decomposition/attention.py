"""Where attention goes because of a piece: the heads that look elsewhere without it, and at which tokens.

    moved    mean over queries of 1/2 sum over keys |a - a without the piece|, of one head of one layer
    gains    keys by the sum of a - a without the piece, added up by token; loses: the other end

Queries are the positions at or after the first one of their document where the piece is needed. A piece of q or k moves
the heads of its own layer; one of v or o, or of an MLP, only those of later layers.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.text.padding import Batch
from diffing.decomposition.curves import masks_with
from diffing.decomposition.evaluation import looked_at
from diffing.decomposition.language import LanguageTask
from diffing.decomposition.model import Decomposition

NEEDED, TOP_KEYS = 0.5, 3


class Head(NamedTuple):
    """How one head attends because of a piece."""

    layer: int
    head: int
    moved: float
    """Share of its attention, 0 to 1."""
    gains: list[str]
    loses: list[str]


@torch.no_grad()
def read_attention(
    decomposition: Decomposition, tokenizer: Any, piece: tuple[str, int], batches: Sequence[Batch], *, top: int = 3
) -> list[Head]:
    """Return the `top` heads that move most; none where the piece is needed nowhere."""
    name, number = piece
    masks = masks_with(decomposition, {name: [number]}, on=False)
    moved: Tensor = torch.zeros(())
    shifts: Tensor = torch.zeros(())
    n = 0
    for batch in batches:
        _, importances = looked_at(decomposition, LanguageTask(), batch)
        needed = (importances[name].lower[..., number] > NEEDED) & batch.attention_mask.bool()
        queries = (needed.cumsum(dim=1) > 0) & batch.attention_mask.bool()
        if not queries.any():
            continue
        own = _patterns(decomposition.model, batch, queries)
        with decomposition.masked(masks):
            change = own - _patterns(decomposition.model, batch, queries)
        n += int(queries.sum())
        moved = moved + change.abs().sum(dim=(2, 3)) / 2
        ids = batch.ids[queries.nonzero()[:, 0]]
        by_token = torch.zeros(*change.shape[:2], len(tokenizer), device=change.device)
        keys = change.flatten(2)
        shifts = shifts + by_token.index_add_(2, ids.flatten(), keys)
    if not n:
        return []
    heads = (moved / n).flatten().topk(min(top, moved.numel())).indices.tolist()
    return [_head(moved / n, shifts, index, tokenizer) for index in heads]


def _head(moved: Tensor, shifts: Tensor, index: int, tokenizer: Any) -> Head:
    layer, head = divmod(index, moved.shape[1])
    gains, loses = (
        [tokenizer.decode([i]) for i in (sign * shifts[layer, head]).topk(TOP_KEYS).indices.tolist()]
        for sign in (1, -1)
    )
    return Head(layer, head, float(moved[layer, head]), gains, loses)


def _patterns(
    model: Any, batch: Batch, queries: Bool[Tensor, "rows positions"]
) -> Float[Tensor, "layers heads queries keys"]:
    """Return the attention of the chosen queries."""
    with eager(model):
        out = model(
            input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False, output_attentions=True
        ).attentions
    return torch.stack([of_layer.float().transpose(1, 2)[queries].transpose(0, 1) for of_layer in out])


@contextlib.contextmanager
def eager(model: Any) -> Iterator[None]:
    """Let the model compute attention in the open, as fused kernels keep it to themselves."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
