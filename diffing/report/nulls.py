"""Counts of specific latents beside the same counts on null pairs: what the report says of null.json.

Reading order: `read_nulls`, `threshold_lines` and `fixed_lines` (the tables), `counts_beside` and `null_sentence` (the
top of the page), `beyond` (what a single latent passes), `null_figure`.
"""

from typing import Any, NamedTuple

import numpy as np

from diffing.report.data import Run
from diffing.report.figures import GREY, TUNED, Figure, line_at, rounded, spec
from diffing.report.text import NONE, counted, fixed, number

COLOURS = {"tuned": TUNED, "placebo": "#2f86c9", "format_only": "#009e73", "rounded": GREY}
SHOWN_CONTEXTS = 6


class Line(NamedTuple):
    """One threshold in a table, as text."""

    rule: str
    """Which latents it calls specific."""
    chosen: str
    """The null and the rate that it was chosen for; empty for one that no null decided."""
    counts: list[str]
    """For each kind of pair: this run's seed, the other seeds in brackets."""
    rate: str
    """False-positive rate with interval and n."""
    expected: str
    """Latents of this run that the rate makes false, and the upper end."""
    contexts: str


def main_score(run: Run) -> str:
    """Return the score that decides the counts: the first in the file."""
    return str(run.nulls["thresholds"][0]["score"])


def threshold_lines(run: Run, *, main: bool) -> list[Line]:
    """Return the thresholds that were chosen on a null, by the main score or by the others."""
    first = main_score(run) if run.nulls else ""
    return [_line(row) for row in run.nulls.get("thresholds", []) if (row["score"] == first) == main]


def _line(row: dict[str, Any]) -> Line:
    contexts = [f"{name} {number(n)}" for name, n in row["contexts"].items()]
    shown = ", ".join(contexts[:SHOWN_CONTEXTS]) + (" …" if len(contexts) > SHOWN_CONTEXTS else "")
    expected = row["expected_false"]
    return Line(
        rule=row["words"].replace("{}", fixed([row["threshold"]])[0]),
        chosen=f"{row['null']}, {row['rate']:.1%}" if row["rate"] else f"{row['null']}, none",
        counts=[seeds_text(entries) for entries in row["counts"].values()],
        rate=rate_text(row) + ("" if row["held_out"] else ", chosen there"),
        expected=NONE if expected is None else f"{expected:.1f}, at most {row['expected_false_high']:.0f}",
        contexts=shown or NONE,
    )


def fixed_lines(run: Run) -> list[Line]:
    """Return thresholds that no null decided, each with its rate on every null."""
    return [
        Line(
            rule=row["words"],
            chosen="",
            counts=[seeds_text(entries) for entries in row["counts"].values()],
            rate="; ".join(f"{kind} {rate_text(rate)}" for kind, rate in row["rates"].items() if kind != "rounded"),
            expected="",
            contexts="",
        )
        for row in run.nulls.get("fixed", [])
    ]


def seeds_text(entries: list[dict[str, Any]]) -> str:
    """Write the count of this run's seed, and those of the others in brackets."""
    first, *others = [number(entry["count"]) for entry in entries]
    return f"{first} ({', '.join(others)})" if others else first


def rate_text(row: dict[str, Any]) -> str:
    if row["false_positive_rate"] is None:
        return NONE
    return f"{row['false_positive_rate']:.2%} ({row['low']:.2%} to {row['high']:.1%}), n = {number(row['n'])}"


def null_sentence(run: Run) -> str:
    """Say how many latents stand out from each null, and how many do so by chance."""
    strictest = min(row["rate"] for row in run.nulls["thresholds"])
    words = []
    for row in run.nulls["thresholds"]:
        if row["score"] == main_score(run) and row["rate"] == strictest:
            latents = counted(row["counts"]["tuned"][0]["count"], "latent")
            where = f"at {strictest:.1%} of {row['null']}" if strictest else f"where {row['null']} has next to none"
            chance = f"{row['expected_false'] or 0:.1f} expected by chance, at most {row['expected_false_high']:.0f}"
            words.append(f"{latents} {where} ({chance} by the 95% interval)")
    return f"Against null pairs, by the larger of the two ratios: {'; '.join(words)}."


def beyond(run: Run, latent: int) -> list[str]:
    """Return the nulls whose threshold for none this latent passes, by the main score."""
    rows = run.nulls.get("thresholds", [])
    return [
        row["null"] for row in rows if row["score"] == main_score(run) and row["rate"] == 0 and latent in row["latents"]
    ]


def null_figure(run: Run) -> Figure:
    """Draw the share of alive latents that each threshold of the main score calls specific, for the pair and its
    nulls."""
    row = next(row for row in run.nulls["curves"] if row["score"] == main_score(run))
    x = np.array(row["thresholds"], dtype=np.float64)
    traces = []
    for kind, shares in row["shares"].items():
        y = np.array(shares, dtype=np.float64)
        y[y == 0] = np.nan  # no place on a log axis
        style = {"color": COLOURS.get(kind, GREY), "width": 2}
        traces.append(
            {"type": "scatter", "mode": "lines", "name": kind, "x": rounded(x), "y": rounded(y), "line": style}
        )
    lines = [
        line_at("x", entry["threshold"])
        for entry in run.nulls["thresholds"]
        if entry["score"] == main_score(run) and entry["rate"] == 0 and entry["threshold"] is not None
    ]
    xaxis = {"title": {"text": "threshold on the larger of |nu_error| and |nu_reconstruction|"}, "range": [0, 1.02]}
    yaxis = {"type": "log", "title": {"text": "share of alive latents"}, "dtick": 1}
    caption = (
        "Share of alive latents that a threshold calls specific (ratio below it, relative decoder norm from 0.5), "
        f"crosscoders of seed {run.nulls['seed']}. Dotted: the thresholds for next to none on a null. A curve ends "
        "where no latent is left."
    )
    return Figure(
        "nulls", "Specific latents at every threshold", caption, spec(traces, shapes=lines, xaxis=xaxis, yaxis=yaxis)
    )
