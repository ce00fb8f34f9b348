"""Words, counts, tables and figures of the report."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import (
    Inventory,
    change_latents,
    page_of,
    rows_of,
    write_run,
)

from diffing import write_report
from diffing.latents.verdict import VERDICTS, Thresholds
from diffing.report.curves import thin
from diffing.report.data import COLUMNS, read_run
from diffing.report.definitions import COLUMNS as DEFINED
from diffing.report.figures import nu_figure
from diffing.report.render import cells
from diffing.report.summary import pair_names
from diffing.report.text import number


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered run of 40 latents; do not change it."""
    made = write_run(tmp_path_factory.mktemp("report") / "run")
    write_report(made)
    return made


@pytest.fixture(scope="module")
def page(run: Path) -> Inventory:
    return Inventory((run / "report.html").read_text(encoding="utf-8"))


def test_an_empty_tuned_only_class_is_said_in_words(page: Inventory) -> None:
    text = page.text
    assert (
        "The published class of tuned-only latents (relative decoder norm above 0.9) is empty (0 of 36 alive latents)"
        in text
    )
    assert "appear as 4 tuned-specific latents and 4 rotated latents instead: both decoder norms are alive" in text


def test_a_tuned_only_class_with_latents_is_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"]["norm_class"].__setitem__(slice(0, 3), ["tuned-only"] * 3))
    text = page_of(run).text
    assert "(relative decoder norm above 0.9) holds 3 of 36 alive latents" in text and "instead" not in text


def test_an_empty_class_without_rotated_latents_claims_no_rotation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"].update(verdict=["shared"] * 40))
    assert "and no latent is rotated either" in page_of(run).text


def test_the_headline_states_the_pair_the_dictionary_and_the_fit_with_n(page: Inventory) -> None:
    text = page.text
    assert "demo-base (base) against demo-chat (tuned) at blocks.2.hook_resid_post: a crosscoder of 40 latents" in text
    assert "trained on 8.19M tokens; on held-out tokens (n = 40,000) it has 15.9 active latents per token (L0)" in text
    assert "0.963 of the base model's and 0.958 of the tuned model's variance (FVE)" in text


def test_counts_in_json_equal_a_hand_count(run: Path) -> None:
    rows = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    # 40 latents repeat a pattern of ten verdicts four times: three shared of ten, one of every other word.
    for verdict in VERDICTS:
        count = {"shared": 12}.get(verdict, 4)
        row = {
            "name": f"report.verdict.{verdict}.count",
            "value": count,
            "unit": "latents",
            "n": 40,
            "low": None,
            "high": None,
        }
        assert rows[row["name"]] == row
    assert rows["report.alive.count"]["value"] == 36
    assert (
        sum(rows[f"report.norm_class.{name}.count"]["value"] for name in ("base-only", "shared", "tuned-only", "other"))
        == 36
    )
    assert (rows["report.fve.tuned"]["value"], rows["report.fve.tuned"]["n"]) == (0.9581, 40_000)


def test_a_latent_below_the_bound_of_tokens_is_not_alive_and_in_no_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"]["n_active"].__setitem__(slice(1, 3), [29, 30]))
    assert rows_of(run)["report.alive.count"]["value"] == 35
    assert "n = 35 alive latents" in page_of(run).text
    assert "Left out: 5 not alive (active on fewer than 30 tokens)" in page_of(run).text


def test_measures_come_from_the_last_heldout_line_without_eval_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "eval.json").unlink()
    rows = rows_of(run)
    assert (rows["report.l0"]["value"], rows["report.l0"]["n"]) == (16.2, 40_000)


def test_the_table_follows_the_rank_and_puts_unranked_latents_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"]["rank"].reverse())
    latents = [row["latent"] for row in json.loads(write_report(run).json.read_text())["latents"]]
    assert latents[0] == 39 and latents[-4:] == [0, 10, 20, 30]


def test_extra_columns_stand_at_the_end_of_the_table(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    heads = re.findall(r'<th scope="col" data-kind="(\w+)" aria-sort="\w+"><button type="button">(.*?)</button>', page)
    names = [name.replace("<wbr>", "") for _, name in heads]
    assert names[: len(DEFINED)] == list(DEFINED)
    assert names[len(DEFINED) :] == ["beta_base_error", "beta_tuned_error", "share_refusal"]


def test_every_column_and_verdict_is_defined() -> None:
    inside = {"nu_error_stderr", "nu_reconstruction_stderr", "main_context_share"}
    assert set(DEFINED) | inside == set(COLUMNS)
    for words in VERDICTS.values():
        assert "{" not in words.format(**Thresholds()._asdict())


def test_the_heat_map_counts_every_latent_once(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", 8_000, n_examples=0))
    z = nu_figure(run.latents).spec["data"][0]["z"]
    counts = [10 ** (value - 0.3) for row in z for value in row if value is not None]
    assert sum(counts) == pytest.approx(7_200, rel=1e-3)  # nine of ten are alive; z is rounded to four digits


def test_thinning_keeps_the_mean() -> None:
    assert thin(np.array([1.0, 3.0, np.nan, 7.0, 9.0]), 2).tolist() == [2.0, 7.0, 9.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.000"), (0.12345, "0.123"), (-0.5, "-0.500"), (0.00123, "0.00123"), (123.45, "123.5"),
     (1e-7, "1e-07"), (12_345, "12,345"), (12_345.6, "12,346")],
)  # fmt: skip
def test_numbers_are_short_and_keep_their_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_ratio_is_shown_with_its_standard_error_in_one_cell(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)

    def change(table: dict[str, Any]) -> None:
        table["columns"].update(nu_error=[0.17512, -0.0001, None], nu_error_stderr=[1e-9, 0.0312, None])

    change_latents(run, change)
    assert cells(read_run(run), "nu_error", [0, 1, 2]) == ["0.175 ± <0.001", "0.000 ± 0.031", "–"]


def test_a_local_model_is_called_by_the_name_of_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    text = (run / "run.json").read_text().replace("demo-base", "/models/some-base").replace("demo-chat", "org/tuned")
    (run / "run.json").write_text(text)
    assert pair_names(read_run(run)) == ("some-base", "org/tuned")
