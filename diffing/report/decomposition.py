"""The section of a parameter decomposition: what there is to explain, its pieces, and sets of them beside other bases.

Reading order: `decomposition_section`, then one function per table or figure.
"""

import re
from pathlib import Path
from typing import Any

from crosscoders.common.files import read_model
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord
from diffing.report.figures import Figure, spec
from diffing.report.sections import Section, Table
from diffing.report.text import NONE, clip, model_name, number

COLOURS = {"pieces": "#d55e00", "svd": "#2f86c9", "weighted_svd": "#009e73", "lora": "#cc79a7", "rotation": "#8a8a8a"}
_CURVE = re.compile(r"decompose\.(sufficiency|necessity)\.(\w+)\.(\d+)")


class DecompositionRun(Record):
    """decomposition.json of `diffing decompose`."""

    again = "decompose again"
    sites: list[str]
    inputs: dict[str, Any]


class DecompositionRows(ResultRecord):
    """eval.json of the same."""

    again = "run diffing decompose again"
    pieces: list[dict[str, Any]]


def decomposition_section(folder: Path, place: int) -> Section:
    """Return the section of a run folder of `diffing decompose`.

    Raises:
        CorruptData: a file is damaged.
    """
    described = read_model(folder / "decomposition.json", DecompositionRun)
    record = read_model(folder / "eval.json", DecompositionRows)
    rows = {entry["name"].removeprefix("decompose."): entry for entry in record["rows"]}
    pair = tuple(model_name(described["inputs"].get(name, {}).get("name", name)) for name in ("base", "tuned"))
    return Section(
        f"decomposition-{place}",
        f"Parameter decomposition: {number(rows['alive']['value'])} pieces of {number(len(described['sites']))} maps",
        _sentences(rows),
        [_left(rows), _pieces(record["pieces"])],
        _curves(record["rows"], place),
        (pair[0], pair[1]),
        record["rows"],
    )


def _sentences(rows: dict[str, Any]) -> list[str]:
    explainable, base, rest = (rows[f"kl.{name}"]["value"] for name in ("explainable", "base", "rest"))
    return [
        f"KL(tuned || base) is {base:.3f} nats a token, of which {explainable:.3f} are to be explained (n = "
        f"{number(rows['kl.base']['n'])} tokens); embeddings, norms, biases and other maps stay tuned and cause "
        f"{rest:.3f} alone.",
        f"{number(rows['alive']['value'])} of {number(rows['alive']['n'])} pieces are important somewhere, "
        f"{rows['l0']['value']:.2f} on a token.",
    ]


def _left(rows: dict[str, Any]) -> Table:
    words = {
        "pieces": "all pieces on, no remainder", "importances": "importances as masks",
        "rounded": "importances rounded to on or off", "stochastic": "random masks above the importances",
    }  # fmt: skip
    cells = [[words.get(name, name), f"{rows[f'unexplained.{name}']['value']:.1%}"] for name in words]
    steps = sorted(int(name.removeprefix("adversary.")) for name in rows if name.startswith("adversary."))
    cells += [[f"after {n} steps of an adversary", f"{rows[f'adversary.{n}']['value']:.1%}"] for n in steps]
    note = "An adversary sets all that is called unimportant; where it leaves much more, do not trust the importances."
    return Table("KL that is not explained", ["masks", "share of the KL to explain"], cells, note)


def _pieces(pieces: list[dict[str, Any]]) -> Table:
    cells = [
        [
            f"{piece['site']} {piece['piece']}", str(piece.get("cluster", NONE)), f"{piece['rate']:.1%}",
            f"{piece['kl_needed']:.3f}, {piece['kl_idle']:.4f}",
            f"{clip(str(piece['main_label']), 40)} ({piece['main_label_share']:.0%})", clip(str(piece["context"])),
            ", ".join(map(repr, piece["raised"])) or NONE,
        ]
        for piece in pieces
    ]  # fmt: skip
    header = [
        "piece",
        "cluster",
        "on tokens",
        "KL without it: needed, idle",
        "mostly in",
        "strongest (>>token<<)",
        "raises",
    ]
    return Table(f"The {len(cells)} pieces that write most", header, cells, "Pieces of one cluster are on together.")


def _curves(rows: list[dict[str, Any]], place: int) -> list[Figure]:
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in rows:
        if match := _CURVE.fullmatch(entry["name"]):
            points.setdefault(match[1], {}).setdefault(match[2], []).append((int(match[3]), entry["value"]))
    titles = {
        "sufficiency": "that the first n pieces give on the base",
        "necessity": "that is lost without the first n",
    }
    return [
        Figure(
            f"decomposition-{kind}-{place}",
            f"Share of the KL to explain {titles[kind]}",
            "Each basis ranked by what its pieces write, over all maps; all of them are the same change.",
            spec(
                [_line(basis, of_basis) for basis, of_basis in bases.items()],
                xaxis={"title": {"text": "pieces"}, "type": "log", "dtick": 1},
                yaxis={"title": {"text": "share of the KL to explain"}},
            ),
        )
        for kind, bases in points.items()
    ]


def _line(basis: str, points: list[tuple[int, float]]) -> dict[str, Any]:
    sizes, shares = (list(values) for values in zip(*sorted(points), strict=True))
    return {
        "type": "scatter", "mode": "lines+markers", "name": basis.replace("_", " "), "x": sizes, "y": shares,
        "line": {"color": COLOURS.get(basis, "#8a8a8a"), "dash": "solid" if basis == "pieces" else "dot"},
    }  # fmt: skip
