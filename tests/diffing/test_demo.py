"""The demo on the embedded pair, with the settings that users get: quality, planted concepts, words."""

import json
import re
from pathlib import Path

import pandas
import pytest

from diffing.demo.command import PLANTED, run_demo
from diffing.demo.settings import DemoSettings

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole demo, once."""
    out = tmp_path_factory.mktemp("demo")
    run_demo(DemoSettings(out=str(out)))
    return out


def test_held_out_fve_and_l0_hold(demo: Path) -> None:
    rows = {row["name"]: row for row in json.loads((demo / "run" / "eval.json").read_text())["rows"]}
    assert rows["eval.fve.base"]["value"] >= 0.95 and rows["eval.fve.tuned"]["value"] >= 0.95
    assert rows["eval.l0"]["value"] <= 26
    assert rows["eval.l0"]["n"] >= 20_000


def test_each_planted_concept_is_the_main_context_of_a_latent_among_the_first_32(demo: Path) -> None:
    table = pandas.read_parquet(demo / "run" / "latents.parquet")
    assert set(PLANTED) <= set(table.nsmallest(32, "rank")["main_context"])


def test_planted_concepts_are_rare_among_latents_drawn_without_the_rank(demo: Path) -> None:
    # The control: over all latents the planted contexts are a minority, so the first 32 did not get them by chance.
    table = pandas.read_parquet(demo / "run" / "latents.parquet")
    first, rest = table.nsmallest(32, "rank"), table.nlargest(len(table) - 32, "rank")
    assert first["main_context"].isin(PLANTED).mean() > 3 * rest["main_context"].isin(PLANTED).mean()


def test_the_second_time_everything_is_there_already_and_the_words_fit(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo / "run" / "report.html").read_bytes()
    text = run_demo(DemoSettings(out=str(demo)))["text"]
    assert (demo / "run" / "report.html").read_bytes() == before
    assert len(before) < 8_000_000
    assert capsys.readouterr().err.count("is complete already") == 3
    rows = [line for line in text.splitlines() if re.match(r" +\d+ +\d+ .*>>.*<<", line)]
    assert len(rows) == 10 + len(PLANTED)  # ten latents, one for each planted concept
    table = pandas.read_parquet(demo / "run" / "latents.parquet")
    if not (table["norm_class"] == "tuned-only").any():
        assert "No latent is tuned-only in the published sense" in text
    assert "google/gemma-2-2b" in text and str(demo) in text
