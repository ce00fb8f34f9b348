"""What the report reads: parts that are absent, and files that do not fit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_pages import (
    change_latents,
    page_of,
    put,
    write_run,
)

from diffing import write_report
from diffing.report.data import MADE_BY, read_run


def test_a_run_without_optional_files_still_renders_and_names_the_commands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in MADE_BY:
        if name != "latents.json":
            (run / name).unlink()
    page = page_of(run)
    evaluate = f"crosscoders eval {run} --cache CACHE --out {run}/eval.json"
    for command in (f"crosscoders train --cache CACHE --out {run}", evaluate, f"diffing scale {run} --cache CACHE"):
        assert command in page.text
    assert "The base model against the tuned model: a crosscoder of 40 latents." in page.text
    report = json.loads((run / "report.json").read_text())
    assert report["config"] is None and "report.fve.base" not in {row["name"] for row in report["rows"]}


@pytest.mark.parametrize("name", [name for name in MADE_BY if name != "latents.json"])
def test_a_run_without_one_optional_file_still_renders(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", 10)
    (run / name).unlink()
    assert f"{name}, which is not in this folder" in page_of(run).text.replace("Settings need ", "")


def test_a_run_of_dead_latents_renders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10, n_examples=0)

    def change(table: dict[str, Any]) -> None:
        table["columns"].update(verdict=["dead"] * 10, rank=[None] * 10, norm_class=[None] * 10, n_active=[0] * 10)

    change_latents(run, change)
    assert "No alive latent has a rank." in page_of(run).text


def test_half_a_last_line_of_the_training_log_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    with (run / "train.jsonl").open("a") as file:
        file.write('{"step": 99999, "to')
    assert len(read_run(run).training) == 160


def test_a_run_without_latents_names_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    (run / "latents.json").unlink()
    expected = f"'{run}' has no latents.json. Run: diffing scale {run} --cache CACHE"
    with pytest.raises(ValueError, match=re.escape(expected)):
        write_report(run)


def test_a_missing_column_is_named_with_its_file_and_mend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table["columns"].pop("decoder_cosine"))
    with pytest.raises(ValueError, match=r"latents\.json has no column 'decoder_cosine'.*Run: diffing scale") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_unequal_columns_are_named_with_both_lengths(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table["columns"]["share_refusal"].pop())
    with pytest.raises(
        ValueError, match=r"latents\.json: column 'share_refusal' has 9 values but 'latent' has 10\. Run: diffing scale"
    ):
        write_report(run)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("verdict", "new", r"column 'verdict', entry 2 is 'new'; expected one of tuned-specific, "),
        ("norm_class", "both", r"column 'norm_class', entry 2 is 'both'; expected one of base-only, "),
        ("nu_error", "0.3", r"column 'nu_error', entry 2 is '0.3'; expected a number"),
        ("main_context", 3, r"column 'main_context', entry 2 is 3; expected text"),
        ("n_active", None, r"column 'n_active', entry 2 is None; expected a whole number"),
        ("nu_error_stderr", [], r"column 'nu_error_stderr', entry 2 is \[\]; expected a number"),
        ("latent", 1, r"column 'latent' names a latent twice"),
    ],
)
def test_a_value_that_does_not_fit_is_quoted(tmp_path: Path, column: str, value: Any, message: str) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table["columns"][column].__setitem__(2, value))
    with pytest.raises(ValueError, match=message):
        write_report(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"format_version 2; this version reads 1"),
        ({"thresholds": {"nu_error": 0.2}}, r"has no threshold 'nu_reconstruction'"),
        ({"n_tokens": None}, r"has n_tokens = None; it must be a whole number"),
        ({"columns": []}, r"has no 'columns'"),
    ],
)
def test_a_latents_file_of_another_shape_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table.update(change))
    with pytest.raises(ValueError, match=message):
        write_report(run)


@pytest.mark.parametrize(
    ("latent", "change", "message"),
    [
        ("999", {}, r"examples of latent '999', which is not in latents.json"),
        ("0", {"values": [1.0]}, r"an example of latent '0' lacks 'tokens' and as many 'values'"),
        ("0", {"peak": 40}, r"an example of latent '0' has peak 40 but 40 tokens"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(
    tmp_path: Path, latent: str, change: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run", 10)
    example = json.loads((run / "examples.json").read_text())["latents"]["0"][0] | change
    put(run, "examples.json", {"format_version": 1, "latents": {latent: [example]}})
    with pytest.raises(ValueError, match=message):
        write_report(run)


def test_a_broken_line_inside_the_training_log_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    lines = (run / "train.jsonl").read_text().splitlines()
    (run / "train.jsonl").write_text("\n".join([lines[0], '{"step": 3', *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2 is not JSON"):
        write_report(run)
