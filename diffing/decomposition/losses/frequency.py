"""Frequency: a penalty that grows faster than how often a piece is on, so that two rare pieces cost less than one that
does the work of both."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def frequency(totals: Sequence[Float[Tensor, " _"]], n_positions: int, reference_positions: float) -> Float[Tensor, ""]:
    """Return sum_c f_c log2(1 + reference_positions f_c), with f_c the mean penalty of piece c over the whole batch.

    reference_positions: n_positions for the paper's form, log2(1 + sum of the batch); a constant makes the term the
    same for every batch size. The sums have to be of the whole batch: the logarithm of parts does not add up.
    """
    f = torch.cat(list(totals)) / n_positions
    return (f * torch.log2(1 + reference_positions * f)).sum()
