"""How much of a change its pieces leave out. Source: VPD (2026); relative for a fine-tune, whose change is small."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def faithfulness(remainders: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """Return the squares of all remainders over the number of their entries: pooled, no mean of means."""
    squares = torch.stack([remainder.square().sum() for remainder in remainders]).sum()
    return squares / sum(remainder.numel() for remainder in remainders)


def relative_remainder(
    remainders: Sequence[Float[Tensor, "_ _"]], deltas: Sequence[Float[Tensor, "_ _"]]
) -> Float[Tensor, ""]:
    """Return ||R||^2 / ||D||^2 of each site, as the mean over sites; a site without a change counts with ||R||^2."""
    shares = []
    for remainder, delta in zip(remainders, deltas, strict=True):
        norm = delta.square().sum()
        shares.append(remainder.square().sum() / torch.where(norm > 0, norm, torch.ones_like(norm)))
    return torch.stack(shares).mean()
