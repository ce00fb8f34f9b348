"""The section of a parameter decomposition: what is explained, its pieces, and curves beside other bases."""

import json
from pathlib import Path

import pytest

from crosscoders import CorruptData
from crosscoders.common.results import row
from diffing.report.decomposition import decomposition_section
from diffing.report.publishing import write_report


def write_decomposition(folder: Path, context: str = "a >>cat<< sat") -> Path:
    inputs = {name: {"name": f"org/{name}", "hash": "0"} for name in ("base", "tuned")}
    (folder / "decomposition.json").write_text(json.dumps({"sites": ["layers.0.q", "layers.1.q"], "inputs": inputs}))
    values = {
        "kl.base": 2.0, "kl.explainable": 1.5, "kl.rest": 0.25, "alive": 7, "l0": 1.25, "unexplained.pieces": 0.01,
        "unexplained.importances": 0.02, "unexplained.rounded": 0.031, "unexplained.stochastic": 0.04,
        "adversary.0": 0.05, "adversary.20": 0.41, "sufficiency.pieces.1": 0.1, "sufficiency.pieces.16": 0.9,
        "sufficiency.svd.1": 0.05, "necessity.pieces.1": 0.3,
    }  # fmt: skip
    piece = {
        "site": "layers.0.q", "piece": 3, "cluster": 2, "rate": 0.125, "kl_needed": 0.5, "kl_idle": 0.0012,
        "main_label": "chat", "main_label_share": 0.75, "context": context, "raised": [" cat"],
    }  # fmt: skip
    rows = [row(f"decompose.{name}", value, "share", 900) for name, value in values.items()]
    (folder / "eval.json").write_text(json.dumps({"rows": rows, "pieces": [piece]}))
    return folder


def test_the_section_says_what_is_explained_and_what_an_adversary_leaves(tmp_path: Path) -> None:
    section = decomposition_section(write_decomposition(tmp_path), 0)
    assert section.title == "Parameter decomposition: 7 pieces of 2 maps" and section.pair == ("org/base", "org/tuned")
    assert "1.500 are to be explained" in section.sentences[0]
    left, pieces = section.tables
    assert ["importances rounded to on or off", "3.1%"] in left.rows
    assert left.rows[-1] == ["after 20 steps of an adversary", "41.0%"]
    assert pieces.rows[0][:4] == ["layers.0.q 3", "2", "12.5%", "0.500, 0.0012"]


def test_each_kind_of_curve_is_a_figure_with_a_line_for_each_basis(tmp_path: Path) -> None:
    figures = {figure.name: figure for figure in decomposition_section(write_decomposition(tmp_path), 1).figures}
    assert figures.keys() == {"decomposition-sufficiency-1", "decomposition-necessity-1"}
    lines = figures["decomposition-sufficiency-1"].spec["data"]
    assert [(line["name"], line["x"], line["y"]) for line in lines] == [
        ("pieces", [1, 16], [0.1, 0.9]),
        ("svd", [1], [0.05]),
    ]


def test_a_page_of_a_decomposition_alone_holds_its_text_as_text(tmp_path: Path) -> None:
    page = write_report(write_decomposition(tmp_path, context="<script>x</script>")).html.read_text()
    assert "Parameter decomposition" in page and "<script>x" not in page and "&lt;script&gt;x" in page


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    (write_decomposition(tmp_path) / "eval.json").write_text("{")
    with pytest.raises(CorruptData, match=r"eval\.json"):
        decomposition_section(tmp_path, 0)
