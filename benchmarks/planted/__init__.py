"""How good each score for "tuned-only" is, on activations with planted features.

Every variant is trained on the same planted activations, seed by seed (features, tokens and crosscoder), its latents
are matched to the features, and every score is judged by what it flags. Rows `planted.<variant>...` are of the
standard size, with the suffixes `-narrow` and `-wide` of other sizes, with `-independent` of a control in which no
feature depends on another, with `-unkind` and `-unkind-outliers` of the unkind world (three seeds, recall by kind too).
A value is the mean over seeds, low and high its 95% interval (Student's t over seeds, cut to [0, 1]), n the number of
seeds on which it is defined. Bounds that are not published were chosen on other seeds of the standard size
(`benchmarks.planted.calibration`), the bound of siblings on another seed of the unkind world.

`quick`: one seed of the standard size, fewer steps; n = 1 and no interval.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.planted.kinds import by_kind
from benchmarks.planted.runs import SIZES, VARIANTS, Run, draw, run_one
from benchmarks.planted.summary import Summary, summarise
from crosscoders.common import files
from crosscoders.common.errors import InputError, nearest
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from crosscoders.common.statistics import t_interval

SEEDS = range(5)
UNKIND_SEEDS = range(3)
OTHER_VARIANTS = ("l1", "batchtopk")
"""What is trained at other sizes than the standard one: the published pair."""
QUICK_STEPS = 600


class SummaryRecord(Record):
    """Measures of one crosscoder."""

    measures: dict[str, Any]


def run(quick: bool, work: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return rows `planted.<variant>.*`.

    work: folder in which the measures of every crosscoder are kept; only: sizes and worlds, default all.

    Raises:
        InputError: no size of that name.
    """
    for name in only:
        if name not in SIZES:
            raise InputError(f"planted has no size {name!r}{nearest(name, list(SIZES))} There are {', '.join(SIZES)}.")
    work = work / ("quick" if quick else "full")
    rows: list[dict[str, Any]] = []
    for name in only or SIZES:
        if quick and not only and name != "standard":
            continue
        suffix, variants = ("", tuple(VARIANTS)) if name == "standard" else (f"-{name}", OTHER_VARIANTS)
        seeds = (UNKIND_SEEDS if name.startswith("unkind") else SEEDS)[: 1 if quick else None]
        for variant in variants:
            steps = QUICK_STEPS if quick else SIZES[name].n_steps(variant)
            of_seeds = [
                summary_of(work / f"{name}-{variant}-{seed}.json", name, variant, seed, steps) for seed in seeds
            ]
            rows += over_seeds(f"planted.{variant}{suffix}", of_seeds)
    return {"name": "planted", "rows": rows}


def summary_of(path: Path, name: str, variant: str, seed: int, steps: int) -> Summary:
    """Return all measures of one crosscoder, from its file where it is there."""
    if not path.is_file():
        say(f"planted: {name}, {variant}, seed {seed}")
        one = run_one(draw(SIZES[name], seed), SIZES[name], variant, seed=seed, n_steps=steps)
        files.write_json(path, {"measures": measures_of(one)})
    measures = files.read_model(path, SummaryRecord)["measures"]
    return {measure: (value, unit) for measure, (value, unit) in measures.items()}


def measures_of(one: Run) -> Summary:
    """Return all measures of one crosscoder, with those by kind in the unkind world."""
    return summarise(one) | (by_kind(one) if "kind" in one.truth.table else {})


def over_seeds(
    prefix: str, summaries: list[dict[str, tuple[float | None, str]]], *, signed: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Return one row per measure: mean and interval over the seeds on which it is defined; none where it never is.
    Values in `signed` units may be negative."""
    rows = []
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        of_seeds = [summary[name] for summary in summaries if name in summary]
        values, unit = [value for value, _ in of_seeds if value is not None], of_seeds[0][1]
        if values:
            low, high = interval(
                values, lower=None if unit in signed else 0.0, upper=1.0 if unit.startswith("fraction") else None
            )
            row = {"name": f"{prefix}.{name}", "value": statistics.fmean(values), "unit": unit, "n": len(values)}
            rows.append({**row, "low": low, "high": high})
    return rows


def interval(
    values: list[float], *, lower: float | None = 0.0, upper: float | None
) -> tuple[float | None, float | None]:
    """Return `t_interval`, not below `lower` nor above `upper`; None for a single value."""
    if len(values) < 2:
        return None, None
    low, high = t_interval(values)
    return low if lower is None else max(lower, low), high if upper is None else min(upper, high)
