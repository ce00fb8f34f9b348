"""From rows of every seed to one table: means over seeds, and whether a method found what was planted, or cries wolf.

A method finds, in all seeds together or not at all:

    directions   at some n the pooled rate of a planted behaviour by Fisher's exact test above the null's and random's
    scores       the lower end of its AUROC above the upper ends of the null's and random's, in every seed
    texts        pooled hits by Fisher's exact test above the null's and random's

each at 5%, the test of directions divided by the numbers n and behaviours tried. Without planted truth nothing is
found, and a method is `beyond` where its share closed is above random's in every seed.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crosscoders.common.results import row
from crosscoders.common.statistics import t_interval

ERROR = 0.05
Rows = dict[str, dict[str, Any]]
"""Rows of one seed by name."""


def over_seeds(rows_of_seeds: Sequence[Rows]) -> Rows:
    """Return rows of means over seeds; the interval is that over seeds where there are several, else the row's own.

    n is that of all seeds together. A name that a seed lacks is left out.
    """
    shared = [name for name in rows_of_seeds[0] if all(name in rows for rows in rows_of_seeds)]
    means = {}
    for name in shared:
        entries = [rows[name] for rows in rows_of_seeds]
        values = [entry["value"] for entry in entries]
        interval = t_interval(values) if len(values) > 1 else (entries[0]["low"], entries[0]["high"])
        n = sum(entry["n"] for entry in entries)
        means[name] = row(name, statistics.fmean(values), entries[0]["unit"], n, *interval)
    return means


def more_often(hits: int, n: int, others: int, n_others: int) -> float:
    """Return the chance of so many hits, or more, where both rates are one: Fisher's exact test, one-sided."""
    from scipy.stats import fisher_exact

    return float(fisher_exact(np.array([[hits, n - hits], [others, n_others - others]]), alternative="greater").pvalue)


def found_directions(
    method: str, own: Sequence[Rows], null: Sequence[Rows] | None, behaviours: Sequence[str]
) -> dict[str, bool]:
    """Return for each behaviour whether pieces of the method bring it out at some n."""
    sizes = {name.split(".")[-2] for name in own[0] if name.startswith(f"directions.{method}.top_")}
    level = ERROR / max(1, len(sizes) * len(behaviours))
    found = dict.fromkeys(behaviours, False)
    for size in sizes:
        for behaviour in behaviours:
            name, control = (f"directions.{method}.{word}{size}.{behaviour}" for word in ("", "random."))
            hits, n = _pooled(own, name)
            beside = [_pooled(own, control)] + ([_pooled(null, name)] if null else [])
            found[behaviour] |= all(more_often(hits, n, *other) < level for other in beside if other[1])
    return found


def found_scores(method: str, own: Sequence[Rows], null: Sequence[Rows] | None) -> bool:
    """Tell whether planted tokens stand out by the score of the method."""
    name, control = f"scores.{method}.auroc", f"scores.{method}.random.auroc"
    pairs = zip(own, null or own, strict=True)
    return all(
        name in rows
        and rows[name]["low"] > rows[control]["high"]
        and (null is None or rows[name]["low"] > beside[name]["high"])
        for rows, beside in pairs
    )


def found_texts(method: str, own: Sequence[Rows], null: Sequence[Rows] | None) -> bool:
    """Tell whether planted phrases are in the first lines of the method."""
    name = f"texts.{method}.hits"
    hits, n = _pooled(own, name)
    beside = [_pooled(own, f"texts.{method}.random.hits")] + ([_pooled(null, name)] if null else [])
    return all(more_often(hits, n, *other) < ERROR for other in beside if other[1])


def is_beyond(method: str, own: Sequence[Rows]) -> bool:
    """Tell whether at some n the share of KL closed is above that of random pieces in every seed, intervals apart."""
    names = [name for name in own[0] if name.startswith(f"directions.{method}.top_") and name.endswith("share_closed")]
    controls = [name.replace(f"{method}.top_", f"{method}.random.top_") for name in names]
    return any(
        all(control in rows and rows[name]["low"] > rows[control]["high"] for rows in own)
        for name, control in zip(names, controls, strict=True)
    )


def verdict_rows(
    methods: Mapping[str, str], own: Sequence[Rows], null: Sequence[Rows] | None, behaviours: Sequence[str]
) -> list[dict[str, Any]]:
    """Return rows <block>.<method>.found of every method (1 or 0), and .beyond of directions.

    methods: block by method.
    """
    rows = []
    for method, block in methods.items():
        if block == "directions":
            rows.append(row(f"directions.{method}.beyond", int(is_beyond(method, own)), "found", len(own)))
        if not behaviours:
            continue
        if block == "directions":
            found = found_directions(method, own, null, behaviours)
            rows += [
                row(f"directions.{method}.found.{name}", int(yes), "found", len(own)) for name, yes in found.items()
            ]
            is_found = any(found.values())
        else:
            is_found = (found_scores if block == "scores" else found_texts)(method, own, null)
        rows.append(row(f"{block}.{method}.found", int(is_found), "found", len(own)))
    return rows


def _pooled(seeds: Sequence[Rows], name: str) -> tuple[int, int]:
    """Return hits and trials over all seeds, of a row of shares or of counts."""
    entries = [rows[name] for rows in seeds if name in rows]
    is_share = bool(entries) and entries[0]["unit"] == "share"
    hits = sum(round(entry["value"] * entry["n"]) if is_share else round(entry["value"]) for entry in entries)
    return hits, sum(entry["n"] for entry in entries)
