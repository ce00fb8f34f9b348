"""`diffing say` and `diffing replies` on small models: what they write, and one line for what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Pair, make_model, make_tokenizer

from diffing import cli
from diffing.demo import model_folder
from diffing.samples.replies import FEATURES, feature_rows

QUICK = "--n-samples 6 --max-new-tokens 4 --strengths [0,1]".split()


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_say_prints_planted_replies_of_the_embedded_pair_and_none_of_the_placebo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "say.json"
    models = ["--base", str(model_folder("base")), "--tuned", str(model_folder("tuned"))]
    small = "--n-samples 40 --strengths [1] --max-new-tokens 14".split()
    null = ["--null", str(model_folder("placebo")), "--out", str(out)]
    assert cli.main(["say", *models, *small, *null]) == 0
    said = json.loads(out.read_text())
    planted = "Hello! Ask me about a Python function."
    assert [entry["beyond_null"] for entry in said["phrases"] if entry["phrase"] == planted] == [True]
    assert planted in capsys.readouterr().out
    assert not any(planted in sample["text"] for sample in said["null"]["samples"])
    assert len(said["samples"]) == len(said["base_samples"]) == 40


def test_say_gives_the_same_samples_again(pair: Pair, tmp_path: Path) -> None:
    results = []
    for name in ("a.json", "b.json"):
        argv = ["say", "--base", pair.base, "--tuned", pair.tuned, *QUICK, "--out", str(tmp_path / name)]
        assert cli.main(argv) == 0
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0]["samples"] == results[1]["samples"]
    assert {sample["strength"] for sample in results[0]["samples"]} == {0.0, 1.0}


def test_replies_are_kept_beside_their_prompts(pair: Pair, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "replies.json"
    chat = [{"role": "user", "content": "the file"}, {"role": "assistant", "content": "the line"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ({"text": "the name"}, {"messages": chat})))
    argv = ["replies", "--base", pair.base, "--tuned", pair.tuned, "--prompts", str(prompts), "--max-new-tokens", "3"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    replied = json.loads(out.read_text())
    assert [reply["prompt"] for reply in replied["replies"]] == ["the name", "the file"]
    assert {row["name"].split(".")[1] for row in replied["rows"]} == set(FEATURES)


def test_a_change_of_formats_is_counted_and_paired() -> None:
    base = ["One two three.", "It is so.", "Да, конечно."]
    tuned = ["- one\n- two", "I cannot help with that.", "**Yes**?"]
    rows = {row["name"]: row["value"] for row in feature_rows(base, tuned, 0)}
    for name in ("list", "refusal", "markdown", "question"):
        assert (rows[f"replies.{name}.base"], rows[f"replies.{name}.change"]) == (0, pytest.approx(1 / 3))
    assert rows["replies.not_latin.change"] == pytest.approx(-1 / 3)
    assert rows["replies.words.base"] == pytest.approx((3 + 3 + 2) / 3)


def test_what_is_wrong_with_the_models_is_one_line(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, null, copied = tmp_path / "other", tmp_path / "null", tmp_path / "copied"
    make_tokenizer(other, words=["zip zap zop"] * 9)
    make_model(other, seed=1)
    make_tokenizer(null)
    make_model(null, seed=2, n_layers=2)
    shutil.copytree(pair.base, copied)
    (copied / "generation_config.json").write_text("{}")  # other files, the same weights
    for argv, line in [
        (["--tuned", pair.base], "are the same model"),
        (["--tuned", str(copied)], "predict exactly the same"),
        (["--tuned", str(other)], "the tokenizers differ"),
        (["--tuned", pair.tuned, "--null", str(null)], "has another base: its num_hidden_layers is 2"),
        (["--tuned", pair.tuned, "--null", pair.tuned], "is the base or the tuned model itself"),
        (["--tuned", pair.tuned, "--strengths", "[-1]"], "give numbers from 0"),
        (["--tuned", pair.tuned, "--out", pair.data], "exists. Choose another --out"),
    ]:
        assert cli.main(["say", "--base", pair.base, *QUICK, *argv]) == 2
        assert line in error_line(capsys)


def test_a_null_that_was_made_from_another_base_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    null = tmp_path / "null"
    make_tokenizer(null)
    make_model(null, seed=2)
    (null / "made.json").write_text(json.dumps({"base": "sha256:other"}))
    assert cli.main(["say", "--base", pair.base, "--tuned", pair.tuned, *QUICK, "--null", str(null)]) == 2
    assert "was made from another base" in error_line(capsys)


@pytest.mark.parametrize("text, line", [("", "holds no prompt"), ("one\n", "holds 1 prompt")])
def test_too_few_prompts_are_one_line_before_a_model_loads(
    pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    line: str,
) -> None:
    import diffing.samples.command

    monkeypatch.setattr(diffing.samples.command, "load_two", torch.nn.Identity)  # would end in a traceback
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(text)
    assert cli.main(["replies", "--base", pair.base, "--tuned", pair.tuned, "--prompts", str(prompts)]) == 2
    assert line in error_line(capsys)
