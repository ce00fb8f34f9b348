r"""The fast path: products with latents that touch only the active ones, forward and backward.

    active        entries above a gate, without a dense latent tensor
    WarmSelection the n largest scaled latents of a batch, exactly, by a threshold kept from the step before
    largest_per_token    the k largest of some columns, for each token
    gather        pre-activations of active entries; backward: W_enc and b_enc through active entries only
    decode        f W, as one bag per token; backward: W and f through active entries only
    transposed    f^T y, as one bag per latent
    per_latent    counts and sums

At k / dict_size below 1%, bags are 8 to 27 times cheaper on a CPU than the dense products. Gradients equal those of the
dense path (tests/test_sparse.py).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Active:
    """Active entries of a (batch, dict_size) matrix of latents, ordered by token."""

    tokens: Int[Tensor, " n_active"]
    latents: Int[Tensor, " n_active"]
    values: Float[Tensor, " n_active"]
    n_tokens: int
    dict_size: int

    def with_values(self, values: Float[Tensor, " n_active"]) -> "Active":
        """The same places with other values; what was computed from the places alone is kept."""
        other = replace(self, values=values)
        other.__dict__.update({name: self.__dict__[name] for name in ("starts", "by_latent") if name in self.__dict__})
        return other

    @cached_property
    def starts(self) -> Int[Tensor, " batch"]:
        """First entry of each token."""
        return _starts(self.tokens, self.n_tokens)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " n_active"], Int[Tensor, " n_active"], Int[Tensor, " dict_size"]]:
        """The order of entries by latent, their tokens in that order, and the first entry of each latent."""
        order = self.latents.argsort(stable=True)
        return order, self.tokens[order], _starts(self.latents[order], self.dict_size)


def _starts(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_bags"]:
    return torch.searchsorted(sorted_ids, torch.arange(n, device=sorted_ids.device))


def _above(pre_acts: Float[Tensor, "batch dict_size"], gate_at: Float[Tensor, " dict_size"]) -> Int[Tensor, " n"]:
    """Flat positions of entries above their column's gate, ascending."""
    if pre_acts.device.type == "cpu":  # numpy compares and searches 4 to 5 times faster than torch on one thread
        return torch.from_numpy(np.flatnonzero(pre_acts.detach().numpy() > gate_at.detach().numpy()))
    return (pre_acts > gate_at).flatten().nonzero().squeeze(1)


def _entries(pre_acts: Float[Tensor, "batch dict_size"], flat: Int[Tensor, " n"]) -> Active:
    n_tokens, dict_size = pre_acts.shape
    tokens = flat.div(dict_size, rounding_mode="floor")
    return Active(tokens, flat - tokens * dict_size, pre_acts.detach().flatten()[flat], n_tokens, dict_size)


def active(pre_acts: Float[Tensor, "batch dict_size"], gate_at: Float[Tensor, " dict_size"]) -> Active:
    """Entries with pre_j > gate_at_j, where gate_at >= 0; their value is pre_j."""
    return _entries(pre_acts, _above(pre_acts, gate_at))


class WarmSelection:
    """The n largest ReLU(pre_j) c_j of a batch, exactly; ties at the cut go to the lower token and latent.

    Only entries above 0.95 of the last cut are looked at; when fewer than n are, the search is repeated over all
    positive ones. So the state saves time and never changes the result.
    """

    def __init__(self) -> None:
        self.cut = 0.0
        self.n_retries = 0

    def __call__(
        self, pre_acts: Float[Tensor, "batch dict_size"], code_norm: Float[Tensor, " dict_size"], n: int
    ) -> Active:
        nowhere = torch.where(code_norm > 0, 0.0, torch.inf)  # a latent without a decoder is never among the largest
        flat = _above(pre_acts, 0.95 * self.cut / code_norm + nowhere)
        if len(flat) < n and self.cut > 0:
            self.n_retries += 1
            flat = _above(pre_acts, nowhere)
        found = _entries(pre_acts, flat)
        if len(flat) <= n:
            return found
        scaled = found.values * code_norm.detach()[found.latents]
        cut = scaled.kthvalue(len(flat) - n + 1).values
        kept = scaled > cut
        ties = (scaled == cut).nonzero().squeeze(1)[: n - int(kept.sum())]
        kept[ties] = True
        self.cut = float(cut)
        return replace(found, tokens=found.tokens[kept], latents=found.latents[kept], values=found.values[kept])


def largest_per_token(
    pre_acts: Float[Tensor, "batch dict_size"],
    code_norm: Float[Tensor, " dict_size"],
    columns: Int[Tensor, " chosen"],
    k: int,
) -> Active:
    """The k largest ReLU(pre_j) c_j of each token among some columns; entries that are 0 are left out."""
    candidates = pre_acts.detach()[:, columns].relu()
    scaled = candidates * code_norm.detach()[columns]
    chosen = scaled.topk(min(k, len(columns)), dim=1, sorted=False).indices
    values = candidates.gather(1, chosen)
    tokens, place = (values > 0).nonzero(as_tuple=True)
    return Active(tokens, columns[chosen[tokens, place]], values[tokens, place], *pre_acts.shape)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_enc: Tensor, b_enc: Tensor, x: Tensor, entries: Active) -> Tensor:
        ctx.entries, ctx.shape = entries, W_enc.shape
        ctx.save_for_backward(x)
        return entries.values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        entries, (x,) = ctx.entries.with_values(grads[0].contiguous()), ctx.saved_tensors
        W_grad = transposed(entries, x).t().view(ctx.shape)
        b_grad = torch.zeros(entries.dict_size, dtype=x.dtype, device=x.device)
        return W_grad, b_grad.index_add_(0, entries.latents, entries.values), None, None


def gather(
    W_enc: Float[Tensor, "n_models d_model dict_size"],
    b_enc: Float[Tensor, " dict_size"],
    x: Float[Tensor, "batch width"],
    entries: Active,
) -> Active:
    """The same entries with values that carry gradients to W_enc and b_enc; x needs none."""
    entries.by_latent  # noqa: B018  (computed once here, used by both backward passes)
    return entries.with_values(_Gather.apply(W_enc, b_enc, x, entries))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, entries: Active) -> Tensor:
        ctx.entries = entries
        ctx.save_for_backward(values, weight)
        return embedding_bag(entries.latents, weight, entries.starts, mode="sum", per_sample_weights=values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        values, weight = ctx.saved_tensors
        entries, grad = ctx.entries.with_values(values), grads[0].contiguous()
        # d f_nj = <grad_n, w_j>, one product per active entry
        values_grad = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, weight, entries.latents, entries.starts, entries.tokens, 0
        )
        return values_grad, transposed(entries, grad), None


def decode(entries: Active, weight: Float[Tensor, "dict_size width"]) -> Float[Tensor, "batch width"]:
    """f W: one bag per token."""
    return _Decode.apply(entries.values, weight, entries)


def transposed(entries: Active, y: Float[Tensor, "batch width"]) -> Float[Tensor, "dict_size width"]:
    """f^T y: one bag per latent."""
    order, tokens, starts = entries.by_latent
    return embedding_bag(tokens, y, starts, mode="sum", per_sample_weights=entries.values[order])


class PerLatent(NamedTuple):
    """Sums over tokens, one entry per latent."""

    n: Int[Tensor, " dict_size"]
    """Tokens on which it is active."""
    total: Float[Tensor, " dict_size"]
    """sum f, float64."""
    square_total: Float[Tensor, " dict_size"]
    """sum f^2, float64."""
    largest: Float[Tensor, " dict_size"]


def per_latent(entries: Active) -> PerLatent:
    """Count, sum, sum of squares and maximum of each latent."""
    values, latents, dict_size = entries.values.double(), entries.latents, entries.dict_size
    return PerLatent(
        n=torch.bincount(latents, minlength=dict_size),
        total=torch.bincount(latents, weights=values, minlength=dict_size),
        square_total=torch.bincount(latents, weights=values.square(), minlength=dict_size),
        largest=torch.zeros(dict_size, device=values.device).scatter_reduce(0, latents, entries.values, "amax"),
    )
