"""Which latents of a batch are active, as entries in place of a dense tensor.

active        entries above a gate
WarmSelection the n largest scaled latents of a batch, exactly, by a threshold kept from the step before
largest_per_token    the k largest of some columns, for each token
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.kernels import cpu
from crosscoders.kernels.library import usable, usable_rows


def starts(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_bags"]:
    return torch.searchsorted(sorted_ids, torch.arange(n, device=sorted_ids.device))


@dataclass(frozen=True)
class Active:
    """Active entries of a (batch, dict_size) matrix of latents, ordered by token."""

    tokens: Int[Tensor, " n_active"]
    latents: Int[Tensor, " n_active"]
    values: Float[Tensor, " n_active"]
    n_tokens: int
    dict_size: int
    columns: Int[Tensor, " dict_size"] | None = None
    """Where the matrix holds only some latents of the dictionary: which ones."""

    @cached_property
    def starts(self) -> Int[Tensor, " batch"]:
        """First entry of each token."""
        return starts(self.tokens, self.n_tokens)

    @property
    def dictionary_latents(self) -> Int[Tensor, " n_active"]:
        """Latents counted in the whole dictionary."""
        return self.latents if self.columns is None else self.columns[self.latents]


def _above(
    products: Float[Tensor, "batch dict_size"],
    bias: Float[Tensor, " dict_size"] | None,
    gate_at: Float[Tensor, " dict_size"],
    weight: Float[Tensor, " dict_size"],
    guess: int,
) -> cpu.Selected:
    """Entries of products + bias above their column's gate, ordered by token and latent; about `guess` of them."""
    if usable_rows(products) and usable(gate_at, weight):
        return cpu.select_above(products, torch.zeros_like(weight) if bias is None else bias, gate_at, weight, guess)
    pre_acts = products if bias is None else products + bias
    if pre_acts.device.type == "cpu":  # numpy compares and searches 4 to 5 times faster than torch on one thread
        flat = torch.from_numpy(np.flatnonzero(pre_acts.numpy() > gate_at.numpy()))
    else:
        flat = (pre_acts > gate_at).flatten().nonzero().squeeze(1)
    tokens = flat.div(pre_acts.shape[1], rounding_mode="floor")
    latents, values = flat - tokens * pre_acts.shape[1], pre_acts.flatten()[flat]
    return cpu.Selected(tokens, latents, values, values * weight[latents])


def active(pre_acts: Float[Tensor, "batch dict_size"], gate_at: Float[Tensor, " dict_size"], guess: int = 0) -> Active:
    """Entries with pre_j > gate_at_j, where gate_at >= 0; their value is pre_j. `guess`: about how many there are."""
    pre_acts, gate_at = pre_acts.detach(), gate_at.detach()
    found = _above(pre_acts, None, gate_at, gate_at, guess or pre_acts.numel() // 32)
    return Active(found.tokens, found.latents, found.values, *pre_acts.shape)


class WarmSelection:
    """The n largest ReLU(pre_j) c_j of a batch, exactly; ties at the cut go to the lower token and latent.

    Only entries above 0.95 of the last cut are looked at; when fewer than n are, the search is repeated over all
    positive ones. So the state saves time and never changes the result. With a bias, pre = products + bias.
    """

    def __init__(self) -> None:
        self.cut = 0.0
        self.n_retries = 0

    def __call__(
        self,
        products: Float[Tensor, "batch dict_size"],
        code_norm: Float[Tensor, " dict_size"],
        n: int,
        bias: Float[Tensor, " dict_size"] | None = None,
    ) -> Active:
        products, code_norm = products.detach(), code_norm.detach()
        nowhere = torch.where(code_norm > 0, 0.0, torch.inf)  # a latent without a decoder is never among the largest
        found = _above(products, bias, 0.95 * self.cut / code_norm + nowhere, code_norm, 2 * n)
        if len(found.tokens) < n and self.cut > 0:
            self.n_retries += 1
            found = _above(products, bias, nowhere, code_norm, products.numel())
        if len(found.tokens) > n:
            found, self.cut = _keep_largest(found, n)
        return Active(found.tokens, found.latents, found.values, *products.shape)


def _keep_largest(found: cpu.Selected, n: int) -> tuple[cpu.Selected, float]:
    """The n entries of largest `scaled`, in order, ties to the earlier ones; and the smallest that is kept."""
    if usable(*found):
        return cpu.keep_largest(found, n)
    cut = found.scaled.kthvalue(len(found.scaled) - n + 1).values
    kept = found.scaled > cut
    kept[(found.scaled == cut).nonzero().squeeze(1)[: n - int(kept.sum())]] = True
    return cpu.Selected(*(column[kept] for column in found)), cut.item()


def largest_per_token(
    products: Float[Tensor, "batch dict_size"],
    code_norm: Float[Tensor, " dict_size"],
    columns: Int[Tensor, " chosen"],
    k: int,
    bias: Float[Tensor, " dict_size"] | None = None,
) -> Active:
    """The k largest ReLU(pre_j) c_j of each token among some columns; entries that are 0 are left out. With a bias,
    pre = products + bias."""
    products, weight, k = products.detach(), code_norm.detach()[columns], min(k, len(columns))
    bias = torch.zeros_like(weight) if bias is None else bias[columns]
    if usable(products, weight, columns):
        tokens, places, values = cpu.largest_per_token(products, bias, weight, columns, k)
    else:
        pre_acts = products[:, columns] + bias
        scaled = pre_acts.relu() * weight
        kept = torch.zeros_like(scaled, dtype=torch.bool).scatter(1, scaled.topk(k, dim=1, sorted=False).indices, True)
        tokens, places = (kept & (scaled > 0)).nonzero(as_tuple=True)
        values = pre_acts[tokens, places]
    return Active(tokens, places, values, len(products), len(columns), columns)
