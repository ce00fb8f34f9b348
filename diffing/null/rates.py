r"""Scores, counts, thresholds and false-positive rates; pure functions of latent tables.

    evidence(table, score)          one number per latent, larger = more specific; -inf for what is never counted
    threshold_at(evidence, n, r)    the loosest threshold with at most r n false positives on a null; for less than one
                                    of them, beyond its most extreme latent
    rate_interval(k, n, n_eff)      95% interval of a rate from k of n latents that are not independent
    effective_number(...)           n_eff, the number of independent latents that n alive ones count as

A latent is counted as specific when its evidence lies strictly above the threshold. The rate of a threshold is that
count on a null over the alive latents of the null's crosscoder, whether or not they lean towards the tuned model.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float

from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.latents.verdict import alive_latents, eligible, specificity

ALIGNED = 0.3
"""Cosine of tuned decoders from which two latents count as one in `effective_number`. Random directions of width 128
have a standard deviation of 0.09, wider ones less; docs/log.md has what was measured below and above it."""
RARE = 0.1
"""Latents that the threshold for a rate of 0 lets through in a further null crosscoder, on average."""
GRAM_ROWS = 4096
"""Latents whose neighbours are counted; with more alive ones, evenly spaced among them."""


class Score(NamedTuple):
    """A number by which latents are called specific to the tuned model."""

    words: str
    """What is specific, with the threshold as `{}`."""
    sign: int
    """1 where a large value is specific, -1 where a small one is."""
    best: float
    """The value beyond which there is none."""


SCORES = {
    "larger_ratio": Score("larger ratio below {}", -1, 0.0),
    "nu_error": Score("|nu_error| below {}", -1, 0.0),
    "nu_reconstruction": Score("|nu_reconstruction| below {}", -1, 0.0),
    "relative_decoder_norm": Score("relative decoder norm above {}", 1, 1.0),
    "decoder_cosine": Score("decoder cosine below {}", -1, -1.0),
    "specificity": Score("specificity above {}", 1, 1.0),
}
"""The first, the larger of |nu_error| and |nu_reconstruction|, is the main one: its counts are shown first."""


def score_values(table: pandas.DataFrame, score: str) -> Float[np.ndarray, " dict_size"]:
    """Return the score of each latent, in its own unit."""
    if score == "specificity":
        return specificity(table)
    if score == "larger_ratio":
        return np.asarray(np.maximum(table["nu_error"].abs(), table["nu_reconstruction"].abs()), dtype=np.float64)
    values = table[score].abs() if score.startswith("nu_") else table[score]
    return np.asarray(values, dtype=np.float64)


def evidence(table: pandas.DataFrame, score: str) -> Float[np.ndarray, " dict_size"]:
    """Return the score, signed so that larger is more specific; -inf where the latent is not `eligible`."""
    values = SCORES[score].sign * score_values(table, score)
    return np.where(eligible(table) & ~np.isnan(values), values, -np.inf)


def _n_allowed(n: int, rate: float) -> int:
    """Return whole latents of n that a rate allows; 0.01 of 300 is 3, whatever its float says."""
    return math.floor(rate * n + 1e-9)


def threshold_at(null: Float[np.ndarray, " dict_size"], n: int, rate: float, best: float = math.inf) -> float:
    """Return the loosest threshold that at most `rate` n entries of a null's evidence exceed: its (floor(rate n) +
    1)-th largest entry; -inf where so few are eligible that none need be excluded. n is the number of alive latents,
    `best` the largest evidence that the score can have.

    For less than one latent, rate n < 1: where a further crosscoder of the null has `rate` n of them on average, or
    RARE if that is more; no looser than the largest entry. With K = round(sqrt(n)), u the (K + 1)-th largest entry and
    s the mean by which the K largest exceed it: u + s ln(K / expected). That is exact for exponential tails (Weissman
    1978, JASA 73, 812). The largest entry alone would let one latent of a further crosscoder through, since n + 1
    exchangeable ones are equally likely to be the most extreme.
    """
    ordered = np.sort(null)[::-1]
    n_allowed = _n_allowed(n, rate)
    if n_allowed:
        return float(ordered[n_allowed]) if n_allowed < len(null) else -math.inf
    ordered = ordered[np.isfinite(ordered)]
    k = min(round(n**0.5), len(ordered) - 1)
    if k < 1:
        return float(ordered.max(initial=-math.inf))
    excess = float((ordered[:k] - ordered[k]).mean())
    beyond = float(ordered[k]) + excess * math.log(k / max(rate * n, RARE))
    return min(max(beyond, float(ordered[0])), best)


def chance(n: int, rate: float) -> float:
    """Return the share of the latents of a further null crosscoder that the threshold for a rate is expected to let
    through."""
    n_allowed = _n_allowed(n, rate)
    return (n_allowed + 1) / (n + 1) if n_allowed else max(rate, RARE / n) if n else 0.0


# ---------------------------------------------------------------------------------------------------------- intervals


def effective_number(crosscoder: Crosscoder, table: pandas.DataFrame) -> float:
    """Return how many independent latents the n alive ones of a crosscoder count as.

        n_eff = n / mean_i #{j : |cos(d_i^tuned, d_j^tuned)| >= ALIGNED},  i and j alive, j = i included

    Latents whose tuned decoders align count as copies of each other, all others as independent. For events of equal
    probability p of which only aligned ones depend on each other, the variance of their share is at most
    p (1 - p) / n_eff, and equal to it where aligned latents are copies. Not covered: dependence between latents with
    unaligned decoders, and whatever moves all latents of one crosscoder together; only other seeds show that.
    Source: Kish 1965, Survey Sampling, 8.2 (design effect); the neighbourhood form is ours.
    """
    chosen = alive_latents(table)
    if not len(chosen):
        return 0.0
    directions = crosscoder.decoder().detach().float()[torch.from_numpy(chosen), 1]
    directions = torch.nn.functional.normalize(directions, dim=1)
    rows = torch.linspace(0, len(chosen) - 1, min(len(chosen), GRAM_ROWS)).long()
    near = [((directions[part] @ directions.T).abs() >= ALIGNED).sum(dim=1) for part in rows.split(512)]
    return float(len(chosen) / torch.cat(near).clamp_min(1).double().mean())


def rate_interval(k: float, n: int, n_effective: float) -> tuple[float, float]:
    """Return the 95% interval of a rate from k false positives among n latents that count as `n_effective` independent
    ones.

    Clopper and Pearson's with k n_eff / n of n_eff: Beta quantiles, which need no whole numbers. Source: Korn and
    Graubard 1998, Survey Methodology 24, 193; differs: the design effect comes from decoders, not from replicates,
    whose variance is 0 where every count is 0. With k chosen by `threshold_at` the same upper end bounds the rate of
    new latents of the same crosscoder (Wilks 1941).
    """
    from scipy.stats import beta

    if not n:
        return 0.0, 1.0
    hits = k * n_effective / n
    low = float(beta.ppf(0.025, hits, n_effective - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(0.975, hits + 1, n_effective - hits)) if n_effective > hits else 1.0
    return low, high
