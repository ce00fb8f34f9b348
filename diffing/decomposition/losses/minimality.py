"""Importance minimality: how many pieces are on, as a smooth count of importances.

    smooth_l0(g) = g^2 / (g^2 + gamma^2)    no cliff at 0; gamma falls from 1 to .01 over a run. The default.
    power(g)     = (g + eps)^p              the paper's, p from 2 to .4

`sums` adds up a batch, part by part where it is in parts; the losses divide once.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def smooth_l0(g: Float[Tensor, "*positions components"], gamma: float) -> Float[Tensor, "*positions components"]:
    """Return g^2 / (g^2 + gamma^2). Source: Geman and McClure 1985."""
    return g.square() / (g.square() + gamma**2)


def power(
    g: Float[Tensor, "*positions components"], p: float, eps: float = 1e-12
) -> Float[Tensor, "*positions components"]:
    """Return (g + eps)^p."""
    return (g + eps) ** p


def sums(
    penalties: Mapping[str, Float[Tensor, "*positions _"]], counted: Bool[Tensor, "*positions"]
) -> dict[str, Float[Tensor, " components"]]:
    """Return the penalty of each piece, added up over the counted positions."""
    return {name: (of_site * counted[..., None]).flatten(end_dim=-2).sum(dim=0) for name, of_site in penalties.items()}


def minimality(totals: Sequence[Float[Tensor, " _"]], n_positions: int) -> Float[Tensor, ""]:
    """Return the penalty per position, added over the pieces of all sites; totals: of each site, of the whole batch."""
    return torch.cat(list(totals)).sum() / n_positions
