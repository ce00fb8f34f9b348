"""The section about what the models say: say.json and replies.json in, tables out, or their commands."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_pages import HARMLESS, PAYLOADS, page_of, write_run

from crosscoders import CorruptData
from crosscoders.common.results import row
from diffing.report.publishing import write_report


def with_samples(folder: Path, phrase: str) -> Path:
    """A run folder with one phrase in 17 of 40 samples, and replies that are 3.5 words shorter."""
    run = write_run(folder, tokens=HARMLESS)
    found = {"phrase": phrase, "z": 4.5, "n_tuned": 17, "n_base": 0, "examples": ["So: zip."], "beyond_null": True}
    sample = {"strength": 2.0, "prompt": "", "text": "a sample of strength two", "gain": 3.25}
    said: dict[str, Any] = {
        "format_version": 1,
        "n_pairs": 40,
        "phrases": [found],
        "top_samples": [sample],
        "null": None,
    }
    (run / "say.json").write_text(json.dumps(said))
    rows = [
        row("replies.words.base", 9.0, "words", 3, 8.0, 10.0),
        row("replies.words.tuned", 5.5, "words", 3, 5.0, 6.0),
        row("replies.words.change", -3.5, "words", 3, -4.0, -3.0),
    ]
    replied = {"format_version": 1, "rows": rows, "replies": [{"prompt": "a", "base": "b", "tuned": "c"}] * 3}
    (run / "replies.json").write_text(json.dumps(replied))
    return run


def test_the_page_has_phrases_samples_and_replies(tmp_path: Path) -> None:
    run = with_samples(tmp_path / "run", "zip zap")
    text = page_of(run).text
    for words in ("zip zap", "17", "beyond it", "So: zip.", "3.25", "a sample of strength two", "Replies to 3 prompts",
                  "-3.50 (-4.00 to -3.00)"):  # fmt: skip
        assert words in text
    kept = json.loads((run / "report.json").read_text())
    assert kept["say"]["phrases"][0]["n_tuned"] == 17 and kept["replies"][2]["value"] == -3.5


def test_without_the_files_the_page_names_the_commands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = page_of(run).text
    assert f"--out {run}/say.json" in text and f"--out {run}/replies.json" in text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_a_model_says_is_shown_as_text(tmp_path: Path, payload: str) -> None:
    plain, attacked = (page_of(with_samples(tmp_path / name, text)) for name, text in (("a", "x"), ("b", payload)))
    assert attacked.elements == plain.elements


@pytest.mark.parametrize("name", ["say.json", "replies.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    run = with_samples(tmp_path / "run", "x")
    (run / name).write_text('{"format_version": 1}')
    with pytest.raises(CorruptData, match=f"{name} has no"):
        write_report(run)
