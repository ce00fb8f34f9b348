"""Words, counts, tables and figures of the report."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from report_pages import (
    Inventory,
    change_latents,
    page_of,
    put,
    rows_of,
    write_run,
)

from diffing import write_report
from diffing.latents.stability import write_returns
from diffing.latents.verdict import VERDICTS, Thresholds
from diffing.report.curves import thin
from diffing.report.data import COLUMNS, Example, read_run
from diffing.report.definitions import COLUMNS as DEFINED
from diffing.report.figures import nu_figure
from diffing.report.render import cells
from diffing.report.summary import pair_names
from diffing.report.text import Part, highlight, number


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
        count = {"shared": 12, "tuned-leaning": 0, "base-leaning": 0, "split": 0}.get(verdict, 4)
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


def test_what_came_back_in_other_runs_stands_in_the_table_until_the_table_changes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    latents = json.loads((run / "latents.json").read_text())["columns"]["latent"]
    table = pandas.DataFrame({"came_back": 2, "same_verdict": 1}, index=latents[1:])
    write_returns([str(run), "b", "c"], table)
    page = write_report(run).html.read_text(encoding="utf-8").replace("<wbr>", "")
    assert ">came_back<" in page and ">same_verdict<" in page
    read = read_run(run).latents.columns
    assert read["came_back"] == [None, *[2] * (len(latents) - 1)] and read["same_verdict"][1] == 1
    (run / "latents.json").write_text((run / "latents.json").read_text() + " ")
    assert "came_back" not in read_run(run).latents.columns


def test_extra_columns_stand_at_the_end_of_the_table(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    heads = re.findall(r'<th scope="col" data-kind="(\w+)" aria-sort="\w+"><button type="button">(.*?)</button>', page)
    names = [name.replace("<wbr>", "") for _, name in heads]
    assert names[: len(DEFINED)] == list(DEFINED)
    assert names[len(DEFINED) :] == ["beta_base_error", "beta_tuned_error", "share_refusal"]


def test_every_column_and_verdict_is_defined() -> None:
    inside = {"nu_error_stderr", "nu_reconstruction_stderr", "main_context_share"}
    assert set(DEFINED) | inside == set(COLUMNS)


def test_the_page_names_what_its_standard_errors_leave_out(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run")).text
    assert "not another training, whose spread (diffing stability RUN RUN) is the error that matters" in text
    assert "With BatchTopK nu_error is low by up to 0.02 on planted features of known gain" in text
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


# ------------------------------------------------------------------------------------ characters, groups, warnings


def example(tokens: list[str], values: list[float], peak: int) -> Example:
    return Example(0, "raw", peak, max(values), peak, tokens, values)


def marked(parts: list[Part]) -> list[tuple[str, bool]]:
    return [(part.text, part.is_peak) for part in parts if part.level]


def test_tokens_of_one_character_are_marked_together_with_the_largest_activation() -> None:
    tokens, values = [" fox", " \U0001f44d", "", "", " the", " dog"], [0.0, 0.0, 1.5, 4.0, 0.0, 2.0]
    parts = highlight(example(tokens, values, 3), 4.0)
    assert "".join(part.text for part in parts) == " fox \U0001f44d the dog"
    assert marked(parts) == [(" \U0001f44d", True), (" dog", False)]
    assert [part.value for part in parts if part.level] == ["4.000", "2.000"]


@pytest.mark.parametrize(
    "tokens, peak, expected",
    [
        (["é", "", "a"], 0, "é"),
        (["é", "", "a"], 2, "a"),
        (["", "the", " end"], 0, "the"),  # nothing comes before: it is shown with what comes next
        (["the", " é", ""], 2, " é"),
        (["", ""], 1, ""),
    ],
)
def test_a_peak_that_has_no_text_of_its_own_is_seen(tokens: list[str], peak: int, expected: str) -> None:
    values = [3.0 if i == peak else 0.0 for i in range(len(tokens))]
    parts = highlight(example(tokens, values, peak), 3.0)
    assert [part.text for part in parts if part.is_peak] == [expected]


def test_the_page_says_how_many_groups_were_folded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    assert "counted together" not in page_of(run).text

    def change(table: dict[str, Any]) -> None:
        table["columns"]["share_other"] = [0.25] * 10
        table["n_folded_groups"] = 388

    change_latents(run, change)
    page = page_of(run)
    assert "388 groups of documents, the smaller ones, are counted together as share_other." in page.text
    assert "in the 388 groups that have no column of their own" in page.text
    assert json.loads((run / "report.json").read_text())["n_folded_groups"] == 388


def test_a_page_with_a_dozen_groups_of_four_hundred_holds_every_latent_that_it_held(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1024)

    def change(table: dict[str, Any]) -> None:
        for i in range(12):
            table["columns"][f"share_page_{i:04d}"] = [0.123] * 1024
        table["columns"]["share_other"] = [0.123] * 1024
        table["n_folded_groups"] = 388

    change_latents(run, change)
    files = write_report(run)
    assert files.html.stat().st_size < 8_000_000
    assert len(json.loads(files.json.read_text())["latents"]) == 1024


def test_a_good_run_has_no_warning(run: Path, page: Inventory) -> None:
    assert "must not be read" not in page.text
    assert json.loads((run / "report.json").read_text())["warnings"] == []


def change_evaluation(folder: Path, **values: float) -> None:
    rows = json.loads((folder / "eval.json").read_text())["rows"]
    for row in rows:
        row["value"] = values.get(row["name"].removeprefix("eval.").replace(".", "_"), row["value"])
    put(folder, "eval.json", {"name": "eval", "rows": rows})


@pytest.mark.parametrize(
    "values, said",
    [
        ({"fve_base": 0.31}, "it explains 0.31 of the variance on held-out tokens"),
        ({"fve_tuned": 0.80}, "0.80 of the variance on held-out tokens and 0.96 on its own"),
        ({"dead": 0.93}, "93% of its latents never fire on held-out tokens"),
        ({"l0": 0.2}, "0.2 latents are active per token where k is 16"),
    ],
)
def test_a_bad_run_is_called_unreadable_at_the_top_of_the_page(
    tmp_path: Path, values: dict[str, float], said: str
) -> None:
    run = write_run(tmp_path / "run", 10)
    change_evaluation(run, **values)
    text = page_of(run).text
    assert 0 < text.index("this dictionary must not be read yet") < text.index("Verdicts on 10 latents")
    warnings = json.loads((run / "report.json").read_text())["warnings"]
    assert len(warnings) == 1 and said in warnings[0] and said in text


def test_the_latent_table_speaks_where_nothing_was_held_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    (run / "eval.json").unlink()
    assert "must not be read" not in page_of(run).text

    def change(table: dict[str, Any]) -> None:
        table["columns"]["n_active"] = [0] * 6 + [5000] * 4
        table["columns"]["frequency"] = [0.0] * 6 + [4.0] * 4

    change_latents(run, change)
    assert "60% of its latents never fire on the tokens of the latent table" in page_of(run).text
