"""Measures of the unkind world alone: recall by kind, splits, and the share of right latents among the first 20.

    recall_by_kind.<kind>  features of the kind that a flagged latent matches / planted ones of the kind
    split.precision     latents with the verdict `split` that match a divided feature / latents with that verdict
    split.recall        divided features of which a latent has the verdict `split` / planted ones
    precision_at_20     of the 20 alive latents that an order puts first, the share that match a tuned-only feature

Norms and the decoder difference, which need no data beyond the crosscoder, are the baselines.
"""

from collections.abc import Callable

import numpy as np
import pandas

from benchmarks.planted.runs import Run
from benchmarks.planted.scores import SCORES, alive_rows
from benchmarks.planted.summary import Summary
from benchmarks.planted.unkind import TUNED_ONLY

FIRST = 20
BY_KIND = ("norm", "published_verdict", "without_siblings", "verdict", "verdict_or_leaning")
ORDERS: dict[str, Callable[[pandas.DataFrame], np.ndarray]] = {
    "rank": lambda table: -table["rank"].to_numpy(),
    "norm": SCORES["norm"].value,
    "norm_difference": SCORES["norm_difference"].value,
}
"""Orders of latents, the largest value first."""


def by_kind(run: Run) -> Summary:
    """Return the measures of one crosscoder, by row name without its prefix: (value or None where undefined, unit)."""
    features, latents = run.truth.table, alive_rows(run.table)
    measures: Summary = {}
    for name in BY_KIND:
        flagged = latents[SCORES[name].value(latents) >= SCORES[name].bound]
        for kind in TUNED_ONLY:
            measures[f"{name}.recall_by_kind.{kind}"] = share_matched(features["kind"] == kind, flagged)
    for name, order in ORDERS.items():
        first = latents.iloc[np.argsort(-order(latents), kind="stable")[:FIRST]]
        right = float((first["class"] == "tuned-only").mean()) if len(first) else None
        measures[f"{name}.precision_at_{FIRST}"] = (right, "fraction")
    split = latents[latents["verdict"] == "split"]
    divided = features["kind"] == "divided"
    right = float((split["class"] == "divided").mean()) if len(split) else None
    measures["split.precision"], measures["split.recall"] = (right, "fraction"), share_matched(divided, split)
    for kind in features["kind"].unique():
        of_kind = features["kind"] == kind
        found = features.index[of_kind].isin(latents["feature"])
        measures[f"features.missed.{kind}"] = (float((~found).sum()), "features")
    return measures


def share_matched(chosen: pandas.Series, latents: pandas.DataFrame) -> tuple[float | None, str]:
    """Return the share of the chosen features that one of the latents matches; None where none is planted."""
    found = chosen.index[chosen].isin(latents["feature"])
    return float(found.mean()) if len(found) else None, "fraction"
