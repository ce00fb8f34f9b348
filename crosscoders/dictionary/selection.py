"""Which latents of a batch are active, as entries in place of a dense tensor.

active               entries above a gate
WarmSelection        the n largest scaled latents of a batch, exactly, by a threshold kept from the step before
largest_per_token    the k largest of some columns, for each token
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def starts(ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_bags"]:
    """Return the first place of each of the ids 0 to n - 1 once they are sorted."""
    counts = torch.bincount(ids, minlength=n)
    return counts.cumsum(0) - counts


@dataclass(frozen=True)
class Active:
    """Active entries of a (batch, dict_size) matrix of latents, ordered by token."""

    tokens: Int[Tensor, " n_active"]
    latents: Int[Tensor, " n_active"]
    values: Float[Tensor, " n_active"]
    n_tokens: int
    dict_size: int

    @cached_property
    def starts(self) -> Int[Tensor, " batch"]:
        """Return the first entry of each token."""
        return starts(self.tokens, self.n_tokens)


class Selected(NamedTuple):
    """Chosen entries, ordered by token and latent."""

    tokens: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    scaled: Float[Tensor, " n"]
    """Values times the weight of their latent, by which they are compared."""


def _above(
    pre_acts: Float[Tensor, "batch dict_size"],
    gate_at: Float[Tensor, " dict_size"],
    weight: Float[Tensor, " dict_size"],
) -> Selected:
    """Return the entries above their column's gate, ordered by token and latent."""
    on_cpu = pre_acts.device.type == "cpu"  # numpy compares 2.5 times faster than torch on one thread
    mask = torch.from_numpy(pre_acts.numpy() > gate_at.numpy()) if on_cpu else pre_acts > gate_at
    tokens, latents, values = _entries(pre_acts, mask)
    return Selected(tokens, latents, values, values * weight.index_select(0, latents))


def _entries(
    matrix: Float[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, column and value of each entry that the mask chooses, row by row."""
    if mask.device.type == "cpu":  # numpy searches 4 to 5 times faster than torch on one thread
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    else:
        flat = mask.flatten().nonzero().squeeze(1)
    rows = flat.div(mask.shape[1], rounding_mode="floor")
    return rows, flat - rows * mask.shape[1], matrix.take(flat)


def active(pre_acts: Float[Tensor, "batch dict_size"], gate_at: Float[Tensor, " dict_size"]) -> Active:
    """Return the entries with pre_j > gate_at_j, where gate_at >= 0; their value is pre_j."""
    pre_acts, gate_at = pre_acts.detach(), gate_at.detach()
    above = _above(pre_acts, gate_at, gate_at)
    return Active(above.tokens, above.latents, above.values, *pre_acts.shape)


class WarmSelection:
    """Select the n largest ReLU(pre_j) c_j of a batch, exactly; ties at the cut go to the lower token and latent.

    Only entries above 0.95 of the last cut are looked at; when fewer than n are, the search is repeated over all
    positive ones. So the state saves time and never changes the result.
    """

    def __init__(self) -> None:
        self.cut = 0.0
        self.n_retries = 0

    def __call__(
        self, pre_acts: Float[Tensor, "batch dict_size"], code_norm: Float[Tensor, " dict_size"], n: int
    ) -> Active:
        pre_acts, code_norm = pre_acts.detach(), code_norm.detach()
        nowhere = torch.where(code_norm > 0, 0.0, torch.inf)  # a latent without a decoder is never among the largest
        chosen = _above(pre_acts, 0.95 * self.cut / code_norm + nowhere, code_norm)
        if len(chosen.tokens) < n and self.cut > 0:
            self.n_retries += 1
            chosen = _above(pre_acts, nowhere, code_norm)
        if len(chosen.tokens) > n:
            chosen, self.cut = _keep_largest(chosen, n)
        return Active(chosen.tokens, chosen.latents, chosen.values, *pre_acts.shape)


def _keep_largest(entries: Selected, n: int) -> tuple[Selected, float]:
    """Return the n entries of largest `scaled`, in order, ties to the earlier ones; and the smallest that is kept."""
    cut = entries.scaled.kthvalue(len(entries.scaled) - n + 1).values
    chosen = entries.scaled > cut
    chosen[(entries.scaled == cut).nonzero().squeeze(1)[: n - int(chosen.sum())]] = True
    return Selected(*(column[chosen] for column in entries)), cut.item()


def largest_per_token(
    pre_acts: Float[Tensor, "batch dict_size"],
    code_norm: Float[Tensor, " dict_size"],
    columns: Int[Tensor, " chosen"],
    k: int,
) -> Active:
    """Return the k largest ReLU(pre_j) c_j of each token among some columns; entries that are 0 are left out."""
    some, weight = pre_acts.detach().index_select(1, columns), code_norm.detach().index_select(0, columns)
    k, scaled = min(k, len(columns)), some * weight
    cut = _kth_largest(scaled, k)[:, None].clamp_min(torch.finfo(scaled.dtype).tiny)
    chosen = scaled >= cut
    if int(chosen.sum(dim=1).max()) > k:  # ties at a cut go to the lower latents
        tied = scaled == cut
        room = k - (scaled > cut).sum(dim=1, keepdim=True)
        chosen &= ~tied | (tied.cumsum(dim=1) <= room)
    tokens, numbers, values = _entries(some, chosen)
    return Active(tokens, columns.index_select(0, numbers), values, *pre_acts.shape)


def _kth_largest(matrix: Float[Tensor, "rows columns"], k: int) -> Float[Tensor, " rows"]:
    """Return the k-th largest value of each row."""
    if matrix.device.type == "cpu":  # numpy partitions faster than torch's topk and kthvalue
        at = matrix.shape[1] - k
        return torch.from_numpy(np.partition(matrix.numpy(), at, axis=1)[:, at])
    return matrix.topk(k, dim=1).values[:, -1]
