r"""What is reported of the crosscoders of one variant.

    counts          latents by published norm class, by verdict, and those that pass the published bounds
    false positives the share of alive latents of null pairs that is counted in the same way
    null rates      latents beyond a threshold that a null fixed, and its rate on the null's other seeds
    ratios          quantiles of nu_error and nu_reconstruction in a group of latents, and
                    within_shared: share of the group inside the central 95% of the class `shared` by norm
    causal          KL and share closed by set, of `diffing.causal.summary.causal_rows`

Groups and classes hold alive latents only (`diffing.latents.verdict.is_alive`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from jaxtyping import Bool

from benchmarks.chat_pair.runs import FIRST_TOKENS, TOP
from crosscoders.common import files
from crosscoders.common.records import Record
from crosscoders.common.results import row
from crosscoders.formats.load import load_crosscoder
from diffing.latents.table import read_table
from diffing.latents.verdict import VERDICTS, Thresholds, alive_latents, is_alive, verdicts
from diffing.null.calibration import calibrated_row
from diffing.null.rates import SCORES, effective_number, rate_interval
from diffing.null.runs import Scaled
from diffing.null.summary import result_rows

Summary = dict[str, tuple[float | None, str]]
"""Value, None where it is undefined, and unit, by row name without `chat-pair.<variant>.`."""

RATES = (0.0, 0.01)
"""Rates that thresholds are fixed for on a null."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NO_CLAIM = ("shared", "shared-norm", "dead", "undetermined")
"""Counts that do not say that the models differ, so that they have no false positives."""
SIGNED = ("ratio", "fraction of KL")
"""Units of values that may be negative."""

CALIBRATED = {
    "relative decoder norm at least 0.9 (published)": "tuned-only",
    "|nu_error| below 0.2 and |nu_reconstruction| below 0.5 (published)": "small-ratios",
    "verdict tuned-specific": "tuned-specific",
    "verdict tuned-leaning": "tuned-leaning",
    "verdict rotated": "rotated",
}
"""The words of null.json (`fixed`) -> the count that they are of."""


def judged(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table with verdicts as they are defined now; it may have been made when they were not."""
    return table.assign(verdict=verdicts(table))


def groups(table: pandas.DataFrame) -> dict[str, Bool[np.ndarray, " dict_size"]]:
    """Return which latents each count is of, by name."""
    bounds, living, norm_class = Thresholds(), is_alive(table["n_active"]), table["norm_class"].to_numpy()
    small = np.asarray(
        (table["nu_error"].abs() < bounds.nu_error) & (table["nu_reconstruction"].abs() < bounds.nu_reconstruction)
    )
    tuned_only = living & (norm_class == "tuned-only")
    return {
        "alive": living,
        "tuned-only": tuned_only,
        "base-only": living & (norm_class == "base-only"),
        "shared-norm": living & (norm_class == "shared"),
        "other-norm": living & (norm_class == "other"),
        "tuned-only-small-ratios": tuned_only & small,
        "small-ratios": living & small,
        **{verdict: np.asarray(table["verdict"] == verdict) for verdict in VERDICTS},
    }


def counts(table: pandas.DataFrame) -> Summary:
    """Return <name>.count of every group."""
    return {f"{name}.count": (float(inside.sum()), "latents") for name, inside in groups(table).items()}


def judged_run(folder: Path) -> Scaled:
    """Return the table of a run folder, judged, with the number of independent latents that it counts as."""
    table = judged(read_table(folder))
    return Scaled(table, effective_number(load_crosscoder(folder), table))


def false_positive_rates(nulls: dict[str, list[Scaled]]) -> list[dict[str, Any]]:
    """Return rows <name>.false_positive_rate (of the placebo) and <name>.false_positive_rate_<null> for every count
    that claims a difference: its share of the alive latents of all null crosscoders, with an interval that takes
    dependent latents for fewer (`diffing.null.rates.rate_interval`)."""
    entries = []
    for null, judged_runs in nulls.items():
        inside = [groups(each.table) for each in judged_runs]
        n, n_effective = sum(int(each["alive"].sum()) for each in inside), sum(each.n_effective for each in judged_runs)
        for name in inside[0]:
            if name != "alive" and name not in NO_CLAIM and n:
                count = sum(int((each[name] & each["alive"]).sum()) for each in inside)
                low, high = rate_interval(count, n, n_effective)
                entries.append(row(rate_name(name, null), count / n, "fraction", n, low, high))
    return entries


def null_rates(tuned: list[Scaled], nulls: dict[str, list[Scaled]]) -> list[dict[str, Any]]:
    """Return rows null.<null>.larger_ratio.<rate>.{count,false_positive_rate} of `diffing null`: the threshold that a
    null crosscoder of the first seed fixes, the tuned pair's latents beyond it, and its rate on the null's other
    seeds."""
    tables = {kind: dict(enumerate(judged_runs)) for kind, judged_runs in {"tuned": tuned, **nulls}.items()}
    main = next(iter(SCORES))
    return result_rows({"thresholds": [calibrated_row(tables, null, main, rate) for null in nulls for rate in RATES]})


class Rate(Record):
    """A false-positive rate with its interval."""

    false_positive_rate: float
    n: int
    low: float
    high: float


class Fixed(Record):
    """A threshold that no null decided, with its rate on each null."""

    words: str
    rates: dict[str, Rate]


class NullRecord(Record):
    """null.json, as far as its rates are shown here."""

    again = "run diffing null again"
    fixed: list[Fixed]


def calibrated_rates(run: Path) -> list[dict[str, Any]]:
    """Return the same rows, as far as null.json of a run has them; none without that file."""
    if not (run / "null.json").is_file():
        return []
    entries = []
    for entry in files.read_model(run / "null.json", NullRecord)["fixed"]:
        if entry["words"] in CALIBRATED:
            for null, of in entry["rates"].items():
                name = rate_name(CALIBRATED[entry["words"]], null)
                entries.append(row(name, of["false_positive_rate"], "fraction", of["n"], of["low"], of["high"]))
    return entries


def rate_name(name: str, null: str) -> str:
    return f"{name}.false_positive_rate{'' if null == 'placebo' else f'_{null}'}"


def ratios(table: pandas.DataFrame) -> Summary:
    """Return nu_<target>.<group>.{q05,...,q95,within_shared}; None where a group is empty."""
    longest = table.iloc[alive_latents(table)].nlargest(TOP, "relative_decoder_norm").index
    first = np.isin(np.arange(len(table)), longest)
    inside = groups(table)
    chosen = {"tuned-only": inside["tuned-only"], f"top_{TOP}_norm": first, "shared-norm": inside["shared-norm"]}
    measures: Summary = {}
    for column in ("nu_error", "nu_reconstruction"):
        values = table[column].to_numpy()
        shared = values[inside["shared-norm"]]
        low, high = np.quantile(shared, [0.025, 0.975]) if len(shared) else (np.nan, np.nan)
        for name, mask in chosen.items():
            group, start = values[mask], f"{column}.{name}"
            for q in QUANTILES:
                measures[f"{start}.q{round(100 * q):02d}"] = (
                    float(np.quantile(group, q)) if len(group) else None,
                    "ratio",
                )
            if name != "shared-norm":
                within = float(((group >= low) & (group <= high)).mean()) if len(group) and len(shared) else None
                measures[f"{start}.within_shared"] = (within, "fraction")
    return measures


def causal(rows: Sequence[dict[str, Any]]) -> Summary:
    """Return kl.<set>[.first_9], share_closed.<set>[.first_9], and top_32.<order>[.first_9], which are shares closed
    too."""
    measures: Summary = {}
    for entry in rows:
        *name, what = entry["name"].removeprefix("causal.base_to_tuned.").split(".")
        last = f".first_{FIRST_TOKENS}" if name and name[-1] == f"first_{FIRST_TOKENS}" else ""
        of = ".".join(name).removesuffix(last)
        if what == "kl":
            measures[f"kl.{of}{last}"] = (entry["value"], "nats/token")
        elif what == "share_closed":
            start = of if of.startswith(f"top_{TOP}.") else f"share_closed.{of}"
            measures[f"{start}{last}"] = (entry["value"], "fraction of KL")
    return measures
