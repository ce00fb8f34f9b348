r"""Partners: a latent of the other model that fires together with one that looks specific.

    partner of i    among alive latents of the other side, r_j <= 0.25 for a tuned-specific i and r_j >= 0.75 for a
                    base-specific one, the j of largest Pearson correlation of f_i and f_j over tokens, zeros included

From a correlation of `Thresholds.partner_correlation` on, the other model has said the same on the same tokens, along a
direction of its own: one concept in two latents, and the verdict is `decoupled`. The ratios miss it where the two
directions differ, since neither model's activation holds the other's. Twins (`diffing.latents.twins`) are told by their
common direction instead. Source: ours; docs/log.md has what it gains on planted features.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.dictionary import selection, sparse
from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.latents.contexts import ChosenLatents
from diffing.latents.verdict import STRONG, WEAK, in_common_units, is_alive, ranks, verdicts

OTHER_SIDE = 0.25
"""Largest relative decoder norm of a partner on the base side: its tuned norm is at most half of its base norm."""
COLUMNS = 1024
"""Columns of the other side in one product."""


class _Side(NamedTuple):
    """Latents that look specific to one model, and those of the other model."""

    own: list[int]
    others: list[int]


def _sides(table: pandas.DataFrame) -> list[_Side]:
    """Return the sides with anything to look for."""
    norm, verdict = in_common_units(table)["relative_decoder_norm"], table["verdict"]
    alive = is_alive(table["n_active"])
    sides = [
        _Side(np.flatnonzero(verdict.isin(words)).tolist(), np.flatnonzero(alive & other).tolist())
        for words, other in zip(
            zip(STRONG, WEAK, strict=True), (norm <= OTHER_SIDE, norm >= 1 - OTHER_SIDE), strict=True
        )
    ]
    return [side for side in sides if side.own and side.others]


class _Correlations:
    """Pearson correlations of two sets of columns, in one pass.

    Few of the columns are active on a token, so products are made from the active entries of one set, and with some
    columns of the other at a time.
    """

    def __init__(self, n_own: int, n_others: int) -> None:
        self.n, self.product = 0, torch.zeros(n_own, n_others, dtype=torch.float64)
        self.sums = [torch.zeros(2, n, dtype=torch.float64) for n in (n_own, n_others)]

    def add(self, own: Float[Tensor, "batch own"], others: Float[Tensor, "batch others"]) -> None:
        self.n += len(own)
        entries = selection.active(own, torch.zeros(own.shape[1]))
        for start in range(0, others.shape[1], COLUMNS):
            part = others[:, start : start + COLUMNS].contiguous()
            self.product[:, start : start + COLUMNS] += sparse.transposed(entries, part)
        for sums, f in zip(self.sums, (own.double(), others.double()), strict=True):
            sums += torch.stack([f.sum(dim=0), f.square().sum(dim=0)])

    def result(self) -> Float[Tensor, "own others"]:
        """Return the correlations; 0 where a column is constant."""
        means, variances = zip(*((s[0] / self.n, s[1] / self.n - (s[0] / self.n) ** 2) for s in self.sums), strict=True)
        scale = torch.outer(*(variance.clamp_min(0).sqrt() for variance in variances))
        covariance = self.product / self.n - torch.outer(*means)
        return torch.where(scale > 0, covariance / scale.clamp_min(1e-300), 0.0)


@torch.no_grad()
def with_partners(
    crosscoder: Crosscoder, table: pandas.DataFrame, batches: Iterable[Float[Tensor, "_ n_models d_model"]]
) -> pandas.DataFrame:
    """Return the table with columns partner and partner_correlation, null for latents that do not look specific or have
    none to choose from, and with verdicts that know of them.

    table: with verdicts by norms and ratios. batches: the tokens that it was made on, read only where something looks
    specific.
    """
    partner = pandas.array([None] * len(table), dtype="Int64")
    correlation = np.full(len(table), np.nan)
    sides = _sides(table)
    chosen = sorted({latent for side in sides for part in side for latent in part})
    encoder, place = ChosenLatents(crosscoder, chosen), {latent: i for i, latent in enumerate(chosen)}
    sums = [_Correlations(len(side.own), len(side.others)) for side in sides]
    columns = [[[place[latent] for latent in part] for part in side] for side in sides]
    for x in batches if sides else ():
        f = encoder.encode(x)
        for (own, others), correlations in zip(columns, sums, strict=True):
            correlations.add(f[:, own], f[:, others])
    for side, correlations in zip(sides, sums, strict=True):
        for latent, (value, other) in zip(side.own, zip(*correlations.result().max(dim=1), strict=True), strict=True):
            partner[latent], correlation[latent] = side.others[int(other)], float(value)
    table = table.assign(partner=partner, partner_correlation=correlation)
    return table.assign(verdict=verdicts(table), rank=ranks(table))
