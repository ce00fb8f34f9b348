r"""Products with sparse latents that touch only the active ones.

`active` finds them without a dense latent tensor, `decode` is f W, `transposed` is f^T y. On CPU both are
embedding bags: 14 to 27 times cheaper than the dense product at k / dict_size below 1%.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


class Active(NamedTuple):
    """Active entries of a (batch, dict_size) matrix of latents, ordered by token."""

    tokens: Int[Tensor, " n_active"]
    latents: Int[Tensor, " n_active"]
    values: Float[Tensor, " n_active"]
    n_tokens: int
    dict_size: int


def active(pre_acts: Float[Tensor, "batch dict_size"], gate_at: Float[Tensor, " dict_size"]) -> Active:
    """Entries with pre_j > gate_at_j, where gate_at >= 0; their value is pre_j."""
    tokens, latents = (pre_acts > gate_at).nonzero(as_tuple=True)
    return Active(tokens, latents, pre_acts[tokens, latents], *pre_acts.shape)


def _starts(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_bags"]:
    """First entry of each bag when entries are sorted by bag."""
    return torch.searchsorted(sorted_ids, torch.arange(n, device=sorted_ids.device))


def decode(latents: Active, weight: Float[Tensor, "dict_size width"]) -> Float[Tensor, "batch width"]:
    """f W: one bag per token."""
    return embedding_bag(
        latents.latents,
        weight,
        _starts(latents.tokens, latents.n_tokens),
        mode="sum",
        per_sample_weights=latents.values,
    )


def transposed(latents: Active, y: Float[Tensor, "batch width"]) -> Float[Tensor, "dict_size width"]:
    """f^T y: one bag per latent."""
    order = latents.latents.argsort()
    return embedding_bag(
        latents.tokens[order],
        y,
        _starts(latents.latents[order], latents.dict_size),
        mode="sum",
        per_sample_weights=latents.values[order],
    )


class PerLatent(NamedTuple):
    """Sums over tokens, one entry per latent."""

    n: Int[Tensor, " dict_size"]
    """Tokens on which it is active."""
    total: Float[Tensor, " dict_size"]
    """sum f, float64."""
    square_total: Float[Tensor, " dict_size"]
    """sum f^2, float64."""
    largest: Float[Tensor, " dict_size"]


def per_latent(latents: Active) -> PerLatent:
    """Count, sum, sum of squares and maximum of each latent."""
    values = latents.values.double()
    return PerLatent(
        n=torch.bincount(latents.latents, minlength=latents.dict_size),
        total=torch.bincount(latents.latents, weights=values, minlength=latents.dict_size),
        square_total=torch.bincount(latents.latents, weights=values.square(), minlength=latents.dict_size),
        largest=torch.zeros(latents.dict_size, device=values.device).scatter_reduce(
            0, latents.latents, latents.values, "amax"
        ),
    )
