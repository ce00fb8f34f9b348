"""The stages of the real pair, with commands that need no model."""

from pathlib import Path

import pytest

from benchmarks.real import models, page, stages
from crosscoders import CorruptData, EnvironmentFault


def test_a_stage_runs_once_and_its_page_shows_what_was_run(tmp_path: Path) -> None:
    lines = ["crosscoders --help"]
    first = stages.run_stage("look", lines, tmp_path)
    assert first["commands"] == lines and first["seconds"] > 0
    (tmp_path / "stages" / "look" / "0---help.txt").write_text("kept")
    assert stages.run_stage("look", ["crosscoders no-such-command"], tmp_path) == first
    text = page(tmp_path, {"look": lines, "other": lines})
    assert "$ crosscoders --help\nkept" in text and "## other" not in text


def test_a_stage_that_fails_is_one_line_and_not_done(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="stage look ended with status 2: error: unknown command"):
        stages.run_stage("look", ["crosscoders no-such-command"], tmp_path)
    assert not (tmp_path / "stages" / "look" / "done.json").exists()


def test_another_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CorruptData, match="has sha256"):
        models.require_gguf(tmp_path / "model.gguf")


def test_batches_score_the_answers() -> None:
    from crosscoders.models.names import load_auto
    from diffing.demo import model_folder

    tokenizer = load_auto(str(model_folder("tuned")), "tokenizer")
    batch = next(models.chat_batches(tokenizer, 0))
    assert batch.ids.shape[0] == models.ROWS and not (batch.scored & (batch.attention_mask == 0)).any()
    said = tokenizer.decode(batch.ids[0][batch.scored[0]])
    assert said.endswith("<end_of_turn>") and "<start_of_turn>" not in said
