"""Share of KL closed by exchanged latents: what the report says of causal.json.

Reading order: `read_causal`, `lines` (the table of a direction), `causal_figure`. Names of sets are ours; any other
word in the file is refused, so that the page holds none of its text.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.checks import ENOUGH_CHATS, FEW_CHATS
from crosscoders.common.errors import InputError
from crosscoders.common.files import hash_file
from diffing.report.data import Run, read_object, read_rows
from diffing.report.figures import BASE, TUNED, Figure, line_at, spec
from diffing.report.text import NONE, number

CAUSAL = "diffing causal {run} --cache CACHE"
DIRECTIONS = {"base_to_tuned": ("base into tuned", TUNED), "tuned_to_base": ("tuned into base", BASE)}
_ROW = re.compile(
    r"causal\.(?P<direction>base_to_tuned|tuned_to_base)\."
    r"(?P<set>none|all|error|bias|template|reconstruction|cross_reconstruction|chosen|source_model"
    r"|(?:best|worst)_half\.(?:scaling|norm)|top_\d{1,6}\.(?:scaling|norm|difference|cosine|random))"
    r"(?:\.first_(?P<first>\d{1,6}))?\.(?P<what>kl|share_closed)"
)
NOTE = (
    "The other model's activation, changed in one way, stands in place of the target's own on every scored token: by "
    "the decoder differences of a set of latents; by nothing (none); by the difference of the reconstructions (all, or "
    "on template tokens alone), of what they miss (error), of the decoder biases (bias); or a reconstruction itself, "
    "the target's or the other model's (cross). source model: the other model, unpatched. by scaling: first by Latent "
    "Scaling; by norm: first by relative decoder norm; by difference: first by ||D_tuned - D_base||, the length of the "
    "decoder difference; by cosine: lowest decoder cosine first, these two without data and the same in both "
    "directions; at random: as many alive latents, mean over draws. Where difference closes as much as scaling does, "
    "the share closed speaks of how much is exchanged and not for Latent Scaling. KL is KL(target || patched target), "
    "mean over response tokens, nats/token; share closed = 1 - KL(set) / KL(none). Intervals are 95%, bootstrap over "
    "chats, of a random set over its draws too; they do not cover another training of the crosscoder."
)


class Set(NamedTuple):
    """The KL of one set of latents, and the share that it closes."""

    name: str
    kl: dict[str, Any]
    share: dict[str, Any] | None
    """None where nothing was exchanged."""
    first: dict[str, Any] | None
    """The share on the first tokens of each response."""


class Line(NamedTuple):
    """One set in the table, as text."""

    name: str
    kl: str
    share: str
    first: str


def read_causal(run: Path) -> dict[str, Any]:
    """Return causal.json of a run folder, by direction: `sets`, `n`, `n_documents`, `first_tokens`; empty where there
    is none, or where latents.json was made again since.

    Raises:
        InputError: a row that is shown lacks its numbers.
        CorruptData: it is not JSON.
    """
    path = run / "causal.json"
    if not path.is_file():
        return {}
    again = f"Run: {CAUSAL.format(run=run)}"
    rows = read_rows(path)
    if read_object(path).get("latents") != hash_file(path.with_name("latents.json")):
        return {}
    directions: dict[str, Any] = {}
    for row in rows:
        match = _ROW.fullmatch(row["name"])
        if match is None:
            continue
        if row["value"] is None:
            raise InputError(f"{path}: row {row['name']!r} has no value. {again}")
        sets = directions.setdefault(match["direction"], {"first_tokens": None, "sets": {}})
        parts = sets["sets"].setdefault(match["set"], {})
        parts[match["what"] if match["first"] is None else f"first.{match['what']}"] = row
        sets["first_tokens"] = sets["first_tokens"] or match["first"]
    if not directions:
        raise InputError(f"{path} has no row of a set that the report knows. {again}")
    for direction, entry in directions.items():
        sets = {name: parts for name, parts in entry["sets"].items() if "kl" in parts}
        entry["sets"] = [
            Set(name, parts["kl"], parts.get("share_closed"), parts.get("first.share_closed"))
            for name, parts in sets.items()
        ]
        documents = [row["value"] for row in rows if row["name"] == f"causal.{direction}.documents"]
        entry["n_documents"] = documents[0] if documents else None
    return {name: directions[name] for name in DIRECTIONS if name in directions}


def title(run: Run, direction: str) -> str:
    """Say what was patched into what, with its counts."""
    entry = run.causal[direction]
    n = entry["sets"][0].kl["n"] if entry["sets"] else 0
    chats = "" if entry["n_documents"] is None else f" of {number(entry['n_documents'])} chats"
    few = f". {FEW_CHATS}" if (entry["n_documents"] or ENOUGH_CHATS) < ENOUGH_CHATS else ""
    return f"{DIRECTIONS[direction][0].capitalize()}: n = {number(n)} response tokens{chats}{few}"


def first_title(run: Run, direction: str) -> str:
    """Return the heading of the column about the first tokens of responses."""
    entry = run.causal[direction]
    n = [number(patched.first["n"]) for patched in entry["sets"] if patched.first is not None]
    return f"first {entry['first_tokens']} tokens of a response (n = {n[0]})" if n else "first tokens of a response"


def lines(run: Run, direction: str) -> list[Line]:
    """Return the sets of a direction in the order of the file."""
    return [
        Line(shown(patched.name), f"{patched.kl['value']:.4f}", percent(patched.share), percent(patched.first))
        for patched in run.causal[direction]["sets"]
    ]


def shown(name: str) -> str:
    """Name a set in words."""
    return name.replace("_", " ").replace(".", ", by ").replace("by random", "at random")


def percent(row: dict[str, Any] | None) -> str:
    if row is None:
        return NONE
    low, high = row.get("low"), row.get("high")
    interval = "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
    return f"{row['value']:.1%}{interval}"


def causal_figure(run: Run) -> Figure:
    """Draw the share closed by each set of latents, both directions, with its interval."""
    traces = []
    for direction, entry in run.causal.items():
        words, colour = DIRECTIONS[direction]
        sets = [patched for patched in entry["sets"] if patched.share is not None]
        shares = [patched.share for patched in sets]
        ends = [(s["value"], s.get("low"), s.get("high")) for s in shares]
        bar = {
            "type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
            "array": [0 if high is None else round(high - value, 5) for value, _, high in ends],
            "arrayminus": [0 if low is None else round(value - low, 5) for value, low, _ in ends],
        }  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "markers", "name": words, "marker": {"color": colour, "size": 7},
            "x": [round(value, 5) for value, _, _ in ends], "y": [shown(patched.name) for patched in sets],
            "error_x": bar,
        })  # fmt: skip
    n_sets = max(len(trace["y"]) for trace in traces)
    axis = {"title": {"text": "share of KL closed, 95% interval"}, "tickformat": ".0%"}
    return Figure(
        "causal",
        "Share of KL closed by each set",
        "100% closes all of the KL between the models, 0 none; below 0 the predictions move away. n as in the tables.",
        spec(
            traces,
            height=90 + 24 * n_sets,
            shapes=[line_at("x", 0.0)],
            xaxis=axis,
            yaxis={"autorange": "reversed", "type": "category"},
        ),
    )
