"""Where the bounds in `scores` that are not published come from: `python -m benchmarks.planted.calibration`, 4 minutes.

Three seeds of the standard size that no reported row uses, all variants. A bound is the one of largest mean F1 over
these 12 crosscoders; the gate and the partner bound are chosen from a grid, in this order, with the published ratios.
"""

from collections.abc import Iterable

import numpy as np
import pandas

from benchmarks.planted.runs import N_STEPS, SIZES, VARIANTS, draw, run_one
from benchmarks.planted.scores import SCORES, Score, counted, judge, specific
from diffing.latents.verdict import Thresholds

SEEDS = (100, 101, 102)
GATES = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
PARTNER_BOUNDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def mean_f1(tables: list[pandas.DataFrame], score: Score, n_features: int) -> float:
    return float(np.mean([judge(table, score, n_features)["f1"] for table in tables]))


def best(tables: list[pandas.DataFrame], scores: Iterable[tuple[float, Score]], n_features: int) -> tuple[float, float]:
    """Return the setting of largest mean F1, the first one among equals, and that F1."""
    scored = [(setting, mean_f1(tables, score, n_features)) for setting, score in scores]
    return max(scored, key=lambda pair: pair[1])


def main() -> None:
    size = SIZES["standard"]
    tables = []
    for seed in SEEDS:
        data = draw(size, seed)
        tables += [run_one(data, size, variant, seed=seed, n_steps=N_STEPS).table for variant in VARIANTS]
    report(tables, size.planted.n_tuned_only)


def report(tables: list[pandas.DataFrame], n_features: int) -> None:
    """Print each setting with its mean F1."""
    for name in ("norm_difference", "nu_max", "specificity"):
        value = SCORES[name].value
        bounds = np.quantile(np.concatenate([value(counted(table)) for table in tables]), np.linspace(0.5, 1, 201))
        print(name, best(tables, [(float(bound), Score(value, float(bound))) for bound in bounds], n_features))
    gates = [(gate, at_gate(gate)) for gate in GATES]
    print("gate", [(gate, round(mean_f1(tables, score, n_features), 4)) for gate, score in gates])
    gate, _ = best(tables, gates, n_features)
    partners = [(bound, at_gate(gate, bound)) for bound in PARTNER_BOUNDS]
    print("partner", [(bound, round(mean_f1(tables, score, n_features), 4)) for bound, score in partners])


def at_gate(gate: float, partner_bound: float = 2.0) -> Score:
    """Return the verdict with rotated latents judged from another norm on; a partner bound above 1 asks for no
    partner."""
    bounds = Thresholds(tuned_leaning=gate, base_leaning=1 - gate)
    return Score(lambda t: 1.0 * (specific(t, bounds) & (t["other_side_correlation"] < partner_bound)), 1.0)


if __name__ == "__main__":
    main()
