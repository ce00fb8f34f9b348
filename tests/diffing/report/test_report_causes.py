"""The section about causes: causal.json in, tables and a figure with n and intervals out, or its command."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_pages import HARMLESS, PAYLOADS, page_of, rows_of, write_run

from crosscoders import CorruptData, InputError
from crosscoders.common.files import hash_file
from crosscoders.common.results import row
from diffing.report.causes import causal_figure, read_causal
from diffing.report.data import read_run
from diffing.report.publishing import write_report


def with_causal(folder: Path, *more: dict[str, Any], latents: str | None = None) -> Path:
    """A run folder in which the top 32 close 40% of a KL of 2, and 25% of that of the first 9 tokens."""
    run = write_run(folder, tokens=HARMLESS)
    start = "causal.base_to_tuned"
    rows = [
        row(f"{start}.documents", 7, "documents", 7),
        row(f"{start}.none.kl", 2.0, "nats/token", 1234, 1.9, 2.1),
        row(f"{start}.top_32.scaling.kl", 1.2, "nats/token", 1234, 1.1, 1.3),
        row(f"{start}.top_32.scaling.share_closed", 0.4, "fraction", 1234, 0.35, 0.47),
        row(f"{start}.top_32.scaling.first_9.share_closed", 0.25, "fraction", 55, 0.2, 0.3),
        row(f"{start}.top_32.scaling_minus_norm.share_closed", 0.125, "fraction", 1234, 0.1, 0.2),
        row(f"{start}.top_32.difference.kl", 1.3, "nats/token", 1234, 1.2, 1.4),
        row(f"{start}.top_32.difference.share_closed", 0.35, "fraction", 1234, 0.3, 0.42),
        row(f"{start}.top_32.cosine.kl", 1.4, "nats/token", 1234, 1.3, 1.5),
        row(f"{start}.top_32.cosine.share_closed", 0.3, "fraction", 1234, 0.25, 0.37),
        row("causal.tuned_to_base.none.kl", 1.0, "nats/token", 1234),
        row("causal.tuned_to_base.all.kl", 0.5, "nats/token", 1234),
        row("causal.tuned_to_base.all.share_closed", 0.5, "fraction", 1234),
        *more,
    ]
    described = {"name": "causal", "rows": rows, "latents": latents or hash_file(run / "latents.json")}
    (run / "causal.json").write_text(json.dumps(described))
    return run


def test_the_page_has_each_set_with_n_and_interval(tmp_path: Path) -> None:
    run = with_causal(tmp_path / "run")
    text = page_of(run).text
    assert "Base into tuned: n = 1,234 response tokens of 7 chats. Fewer than 60 chats: the intervals are" in text
    assert "top 32, by scaling" in text and "40.0% (35.0% to 47.0%)" in text and "25.0% (20.0% to 30.0%)" in text
    assert "first 9 tokens of a response (n = 55)" in text and "share closed = 1 - KL(set) / KL(none)" in text
    assert "top 32, by difference" in text and "35.0% (30.0% to 42.0%)" in text and "top 32, by cosine" in text
    assert "12.5%" not in text  # a difference of sets is none
    figure = causal_figure(read_run(run)._replace(causal=read_causal(run))).spec
    points = {trace["name"]: trace for trace in figure["data"]}
    tuned = points["base into tuned"]
    assert tuned["x"] == [0.4, 0.35, 0.3]
    assert tuned["y"] == ["top 32, by scaling", "top 32, by difference", "top 32, by cosine"]
    assert tuned["error_x"]["array"] == [0.07] * 3 and tuned["error_x"]["arrayminus"] == [0.05] * 3
    assert points["tuned into base"]["error_x"]["array"] == [0]  # no interval
    kept = json.loads((run / "report.json").read_text())["causal"]
    assert {entry["name"] for entry in kept} >= {"causal.base_to_tuned.top_32.scaling.share_closed"}
    assert all(set(entry) == {"name", "value", "unit", "n", "low", "high"} for entry in kept)


def test_without_it_or_about_an_earlier_table_the_page_names_the_command(tmp_path: Path) -> None:
    bare, stale = write_run(tmp_path / "bare"), with_causal(tmp_path / "stale", latents="0" * 64)
    for run in (bare, stale):
        assert f"diffing causal {run} --cache CACHE" in page_of(run).text
        assert json.loads((run / "report.json").read_text())["causal"] is None
    assert rows_of(bare)


def test_no_word_of_the_file_reaches_the_page(tmp_path: Path) -> None:
    payloads = [row(f"causal.base_to_tuned.{word}.kl", 1.0, word, 3) for word in PAYLOADS]
    clean, run = with_causal(tmp_path / "clean"), with_causal(tmp_path / "run", *payloads)
    assert page_of(run).text == page_of(clean).text.replace("clean", "run")


@pytest.mark.parametrize(
    "value, n, line",
    [
        ("1", 3, r"has rows\.\d+\.value = '1'"), (True, 3, r"has rows\.\d+\.value = True"),
        (1.0, None, r"has rows\.\d+\.n = None"),
        (None, 3, r"row 'causal\.base_to_tuned\.all\.kl' has no value\. Run: diffing causal"),
    ],
)  # fmt: skip
def test_rows_without_numbers_are_refused(tmp_path: Path, value: Any, n: Any, line: str) -> None:
    broken = {"name": "causal.base_to_tuned.all.kl", "value": value, "unit": "x", "n": n, "low": None, "high": None}
    with pytest.raises((InputError, CorruptData), match=rf"causal\.json:? {line}"):
        write_report(with_causal(tmp_path / "run", broken))


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    run = with_causal(tmp_path / "run")
    (run / "causal.json").write_text("{")
    with pytest.raises(CorruptData, match=r"causal\.json"):
        write_report(run)
    (run / "causal.json").write_text(json.dumps({"rows": [], "latents": hash_file(run / "latents.json")}))
    with pytest.raises(InputError, match="has no row of a set"):
        write_report(run)
