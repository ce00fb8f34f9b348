"""Intervals, one definition each: of a share (`wilson`), of a mean over seeds (`t_interval`), of what is computed from
resampled units (`resample`, then `bootstrap_interval`). All are 95%."""

import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000


def wilson(n_hits: int, n: int) -> tuple[float, float]:
    """Return the interval of a share. Source: Wilson 1927; unlike the normal interval it is right near 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(n_hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean over two or more independent values, such as seeds: mean -+ t stderr."""
    from scipy.stats import t

    mean, stderr = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * stderr
    return mean - half, mean + half


def resample(n_units: int, seed: int | np.random.Generator) -> Float[np.ndarray, "resamples n_units"]:
    """Return how often each unit counts: once in row 0, which is the data itself, then as drawn with replacement.

    A generator goes on from where it stands.
    """
    drawn = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=RESAMPLES)
    return np.concatenate([np.ones((1, n_units)), drawn])


def bootstrap_interval(values: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """Return the percentile interval of a quantity that was computed for each row of `resample`."""
    low, high = np.percentile(values[1:], [2.5, 97.5]).tolist()
    return low, high
