"""Latent tables of a pair and of its nulls -> the calibration: thresholds, rates, and counts beside each other.

`calibrate` is the whole of it: `calibrated_row` for each null, score and rate (threshold from the null of the run's own
seed, checked on the other seeds), `fixed_row` for each published or usual threshold, `curves` for the figure.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
from jaxtyping import Bool

from diffing.latents.verdict import is_alive
from diffing.null.rates import SCORES, chance, evidence, rate_interval, score_values, threshold_at
from diffing.null.runs import Scaled

Tables = dict[str, dict[int, Scaled]]
"""Crosscoders by kind, `tuned` or the name of a null, and by seed; the seed of the run that is judged comes first."""
Test = Callable[[pandas.DataFrame], Bool[np.ndarray, " dict_size"]]

CURVE_POINTS = 100


def _below(score: str, bound: float) -> Test:
    return lambda table: score_values(table, score) < bound


FIXED: dict[str, Test] = {
    "relative decoder norm at least 0.9 (published)": lambda t: np.asarray(t["relative_decoder_norm"] >= 0.9),
    "|nu_error| below 0.2 and |nu_reconstruction| below 0.5 (published)": lambda t: (
        _below("nu_error", 0.2)(t) & _below("nu_reconstruction", 0.5)(t)
    ),
    "verdict tuned-specific": lambda t: np.asarray(t["verdict"] == "tuned-specific"),
    "verdict tuned-leaning": lambda t: np.asarray(t["verdict"] == "tuned-leaning"),
    "verdict rotated": lambda t: np.asarray(t["verdict"] == "rotated"),
    "relative decoder norm at least 0.7": lambda t: np.asarray(t["relative_decoder_norm"] >= 0.7),
    "decoder cosine below 0.2": _below("decoder_cosine", 0.2),
}
"""Thresholds that no null decided, in words; counted among all alive latents, whichever model they lean to."""


def calibrate(tables: Tables, rates: list[float]) -> dict[str, Any]:
    """Return everything that null.json holds about thresholds and counts, as plain data.

    `rounded` fixes no threshold: it differs from the base by so little that nearly every latent of any other pair is
    beyond its most extreme one. It is counted at the thresholds of the others.
    """
    nulls = [kind for kind in tables if kind not in ("tuned", "rounded")]
    return {
        "crosscoders": [
            {"kind": kind, "seed": seed, "n_alive": n_alive(crosscoder.table), "n_effective": crosscoder.n_effective}
            for kind, seeds in tables.items()
            for seed, crosscoder in seeds.items()
        ],
        "thresholds": [
            calibrated_row(tables, null, score, rate) for score in SCORES for null in nulls for rate in rates
        ],
        "fixed": [fixed_row(tables, words, test) for words, test in FIXED.items()],
        "curves": [curves(tables, score) for score in SCORES],
    }


def calibrated_row(tables: Tables, null: str, score: str, rate: float) -> dict[str, Any]:
    """Fix one threshold on the null crosscoder of the run's seed, with what it lets through.

    `false_positive_rate` is over null crosscoders of the other seeds, on which nothing was chosen; where there are
    none it is the calibrating one's own count, and `held_out` is false.
    """
    first, *others = tables[null]
    crosscoder = tables[null][first]
    n, best = n_alive(crosscoder.table), SCORES[score].sign * SCORES[score].best
    threshold = threshold_at(evidence(crosscoder.table, score), n, rate, best)
    counts = {
        kind: [
            {"seed": seed, **_counted(evidence(run.table, score) > threshold, run.table)} for seed, run in seeds.items()
        ]
        for kind, seeds in tables.items()
    }
    checked = [entry for entry in counts[null] if entry["seed"] != first] or counts[null]
    measured = _rate(checked, sum(tables[null][entry["seed"]].n_effective for entry in checked))
    tuned = tables["tuned"][first].table
    specific = tuned[evidence(tuned, score) > threshold]
    n_tuned, share = counts["tuned"][0]["n"], measured["false_positive_rate"]
    if share is not None and not others:  # the count was fixed with the threshold
        share = chance(n, rate)
    return {
        "null": null,
        "score": score,
        "rate": rate,
        "threshold": SCORES[score].sign * threshold if np.isfinite(threshold) else None,
        "words": SCORES[score].words,
        "counts": counts,
        "held_out": bool(others),
        **measured,
        "expected_false": None if share is None else n_tuned * share,
        "expected_false_high": n_tuned * measured["high"],
        "contexts": dict(Counter(specific["main_context"]).most_common()) if "main_context" in specific else {},
        "latents": [int(latent) for latent in specific.index],
    }


def fixed_row(tables: Tables, words: str, test: Test) -> dict[str, Any]:
    """Return the counts of one threshold that no null decided, for every crosscoder."""
    counts = {
        kind: [
            {"seed": seed, **_counted(is_alive(run.table["n_active"]) & test(run.table), run.table)}
            for seed, run in seeds.items()
        ]
        for kind, seeds in tables.items()
    }
    rates = {
        kind: _rate(entries, sum(run.n_effective for run in tables[kind].values()))
        for kind, entries in counts.items()
        if kind != "tuned"
    }
    return {"words": words, "counts": counts, "rates": rates}


def _rate(entries: list[dict[str, int]], n_effective: float) -> dict[str, Any]:
    """Return the share of alive latents that are counted, over crosscoders, with its interval."""
    count, n = (sum(entry[key] for entry in entries) for key in ("count", "n"))
    low, high = rate_interval(count, n, n_effective)
    share = count / n if n else None
    return {"false_positive_rate": share, "low": low, "high": high, "n": n, "n_effective": n_effective}


def curves(tables: Tables, score: str) -> dict[str, Any]:
    """Return the share of alive latents that are at least as specific as each of some latents, by kind, first seed of
    each."""
    by_kind = {kind: evidence(next(iter(seeds.values())).table, score) for kind, seeds in tables.items()}
    pooled = np.sort(np.concatenate([values[np.isfinite(values)] for values in by_kind.values()]))[::-1]
    # Ranks in equal ratios: most points where few latents are left, and none in the long tail of senseless ratios.
    ranks = np.unique(np.geomspace(1, max(1, len(pooled)), CURVE_POINTS).astype(int)) - 1
    grid = pooled[ranks] if len(pooled) else pooled
    n = {kind: max(1, n_alive(next(iter(seeds.values())).table)) for kind, seeds in tables.items()}
    return {
        "score": score,
        "thresholds": (SCORES[score].sign * grid).tolist(),
        "shares": {kind: [int((values >= at).sum()) / n[kind] for at in grid] for kind, values in by_kind.items()},
    }


def _counted(chosen: Bool[np.ndarray, " dict_size"], table: pandas.DataFrame) -> dict[str, int]:
    return {"count": int(chosen.sum()), "n": n_alive(table)}


def n_alive(table: pandas.DataFrame) -> int:
    """Count the alive latents of a table, over which rates are taken."""
    return int(is_alive(table["n_active"]).sum())
