"""The first screen: what is specific, by context, or that nothing is."""

from pathlib import Path
from typing import Any

from report_pages import HARMLESS, change_latents, page_of, write_run


def with_verdicts(folder: Path, verdicts: list[str], contexts: list[str | None]) -> Path:
    run = write_run(folder, tokens=HARMLESS)

    def change(table: dict[str, Any]) -> None:
        columns = table["columns"]
        n = len(columns["latent"])
        columns["verdict"] = [*verdicts, *["shared"] * (n - len(verdicts))]
        columns["main_context"] = [*contexts, *[None] * (n - len(contexts))]
        columns["rank"] = list(range(1, n + 1))
        columns["n_active"] = [1000] * n

    change_latents(run, change)
    return run


def test_the_first_sentence_counts_specific_latents_by_where_they_fire(tmp_path: Path) -> None:
    verdicts = ["tuned-specific", "rotated", "tuned-specific", "tuned-specific", "base-specific"]
    page = page_of(with_verdicts(tmp_path / "run", verdicts, ["refusal", "refusal", "template", "refusal", "raw"]))
    assert "3 latents of 40 alive ones are specific to the tuned model" in page.text
    assert "refusal (2), template (1)" in page.text
    assert "1 latent of 40 alive ones is specific to the base model" in page.text
    widths = [value for name, value in page.values if name == "style" and value.startswith("width")]
    assert sorted(widths) == ["width:100.0%", "width:50.0%", "width:50.0%"]
    assert "How many of them come without any change of behaviour is not known" in page.text


def test_latents_that_are_not_specific_are_not_listed_as_such(tmp_path: Path) -> None:
    page = page_of(with_verdicts(tmp_path / "run", ["rotated", "tuned-specific"], ["refusal", "template"]))
    assert "The first 1 of 1 latents that are specific or leaning" in page.text and "come nearest" not in page.text


def test_where_nothing_is_specific_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(with_verdicts(tmp_path / "run", ["shared", "rotated"], ["refusal", None]))
    assert "No latent is specific to either model: 0 of 40 alive ones." in page.text
    assert "None. The 5 alive latents that come nearest, by rank; they are not specific." in page.text
    assert not any(value.startswith("width") for name, value in page.values if name == "style")


def test_a_weak_verdict_is_called_weak(tmp_path: Path) -> None:
    page = page_of(with_verdicts(tmp_path / "run", ["tuned-leaning", "tuned-leaning"], ["refusal", "gap"]))
    assert "No latent is specific to either model: 0 of 40 alive ones." in page.text
    assert "2 latents of 40 alive ones are leaning to the tuned model, a weak verdict" in page.text
    assert "come nearest" not in page.text
