r"""Twins: a tuned-only and a base-only latent with one direction, the direct trace of Latent Decoupling.

    twins            (i, j), i tuned-only and j base-only by relative norm, both alive, cos(d_i^tuned, d_j^base) > 0.9
    strength         a_i = f_i ||d_i^tuned|| / A,  a_j = f_j ||d_j^base|| / A,  A the larger of their maxima
    divergence       #(one of a_i, a_j > 0.4 and the other <= 0.1) / #(one of them > 0.4): 0 same tokens, 1 disjoint

Twins of divergence near 0 are one concept, split in two; near 1, one direction used in different contexts. The control
pairs each tuned-only latent with a base-only one drawn from those of a cosine below 0.5. Reading order: `twin_pairs`,
`false_pairs`, `divergence`, `add_twins`. Source: Minder et al. 2025 (arXiv 2504.02922). Differs: strengths instead
of plain activations, since the two latents' units need not agree.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.latents.contexts import ChosenLatents
from diffing.latents.verdict import Thresholds, is_alive

COSINE, FALSE_COSINE = 0.9, 0.5
HIGH, LOW = 0.4, 0.1


class Pairs(NamedTuple):
    """Pairs of one tuned-only and one base-only latent."""

    tuned: Int[Tensor, " pairs"]
    base: Int[Tensor, " pairs"]
    cosine: Float[Tensor, " pairs"]


def _sides(table: pandas.DataFrame) -> tuple[Int[Tensor, " tuned"], Int[Tensor, " base"]]:
    """Return alive tuned-only and base-only latents."""
    bounds, norm = Thresholds(), table["relative_decoder_norm"].to_numpy()
    alive = is_alive(table["n_active"])
    tuned, base = alive & (norm >= bounds.tuned_only), alive & (norm <= bounds.base_only)
    return torch.from_numpy(np.flatnonzero(tuned)), torch.from_numpy(np.flatnonzero(base))


def _cosines(crosscoder: Crosscoder, tuned: Int[Tensor, " n"], base: Int[Tensor, " m"]) -> Float[Tensor, "n m"]:
    decoder = crosscoder.W_dec.detach()  # directions only: a scale for each model changes nothing
    chosen = (decoder[tuned.to(decoder.device), 1], decoder[base.to(decoder.device), 0])
    tuned_rows, base_rows = (torch.nn.functional.normalize(rows.cpu(), dim=1, eps=1e-12) for rows in chosen)
    return tuned_rows @ base_rows.T


def twin_pairs(crosscoder: Crosscoder, table: pandas.DataFrame) -> Pairs:
    """Return all twins, highest cosine first."""
    tuned, base = _sides(table)
    cosines = _cosines(crosscoder, tuned, base)
    row, column = (cosines > COSINE).nonzero(as_tuple=True)
    similarity = cosines[row, column]
    order = similarity.argsort(descending=True, stable=True)
    return Pairs(tuned[row[order]], base[column[order]], similarity[order])


def false_pairs(crosscoder: Crosscoder, table: pandas.DataFrame, pairs: Pairs, *, seed: int = 0) -> Pairs:
    """Return the control: each tuned-only latent of `pairs` with a base-only latent drawn from those of low cosine,
    where there is one."""
    base, generator = _sides(table)[1], torch.Generator().manual_seed(seed)
    cosines = _cosines(crosscoder, pairs.tuned, base)
    allowed = cosines < FALSE_COSINE
    some = allowed.any(dim=1)
    drawn = torch.multinomial(allowed[some].float(), 1, generator=generator) if some.any() else torch.zeros(0, 1).long()
    return Pairs(pairs.tuned[some], base[drawn[:, 0]], cosines[some].gather(1, drawn)[:, 0])


@torch.no_grad()
def divergence(
    crosscoder: Crosscoder,
    table: pandas.DataFrame,
    pairs: Pairs,
    batches: Iterable[Float[Tensor, "_ n_models d_model"]],
) -> Float[Tensor, " pairs"]:
    """Return the divergence of each pair over the tokens that the table was made on; NaN where neither is ever
    strong."""
    chosen = torch.cat([pairs.tuned, pairs.base]).unique()
    encoder = ChosenLatents(crosscoder, chosen.tolist())
    norms = crosscoder.decoder_norms.detach().cpu()
    largest = torch.tensor(table["max_activation"].tolist())
    scale = torch.maximum(
        largest[pairs.tuned] * norms[pairs.tuned, 1], largest[pairs.base] * norms[pairs.base, 0]
    ).clamp_min(1e-30)
    columns = [torch.searchsorted(chosen, side) for side in (pairs.tuned, pairs.base)]
    factors = [norms[pairs.tuned, 1] / scale, norms[pairs.base, 0] / scale]
    apart, strong = torch.zeros(len(scale), dtype=torch.int64), torch.zeros(len(scale), dtype=torch.int64)
    for x in batches:
        f = encoder.encode(x)
        a, b = (f[:, column] * factor for column, factor in zip(columns, factors, strict=True))
        strong += ((a > HIGH) | (b > HIGH)).sum(dim=0)
        apart += (((a > HIGH) & (b <= LOW)) | ((b > HIGH) & (a <= LOW))).sum(dim=0)
    return apart.double() / strong


def add_twins(table: pandas.DataFrame, pairs: Pairs, divergences: Float[Tensor, " pairs"]) -> pandas.DataFrame:
    """Return the table with columns twin (the partner of highest cosine), twin_cosine and twin_divergence."""
    twin = pandas.array([None] * len(table), dtype="Int64")
    cosine, apart = np.full(len(table), np.nan), np.full(len(table), np.nan)
    for i in reversed(range(len(pairs.tuned))):  # the highest cosine is written last
        for own, other in ((pairs.tuned[i], pairs.base[i]), (pairs.base[i], pairs.tuned[i])):
            twin[int(own)], cosine[int(own)], apart[int(own)] = int(other), pairs.cosine[i], divergences[i]
    return table.assign(twin=twin, twin_cosine=cosine, twin_divergence=apart)
