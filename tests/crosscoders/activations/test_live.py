"""Training without a cache: the batches, weights and held-out tokens are those of training on the cache."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import Pair

from crosscoders import ActivationCache, run_cache
from crosscoders import cli as crosscoders_cli
from crosscoders.activations.merge import merge_parts
from crosscoders.activations.settings import Part
from diffing import cli as diffing_cli

TRAIN = (
    "--crosscoder.dict-size 24 --crosscoder.k 4 --n-tokens 3200 --batch-size 64 --lr 1e-2 --lr-warmup-steps 5 "
    "--log-every 10 --checkpoint-every 20 --threshold-start-step 5 --input-norm sqrt_d --buffer-tokens 256"
).split()


def config_file(pair: Pair, tmp_path: Path, **changes: object) -> str:
    settings = asdict(pair.config(tmp_path / "unused")) | changes
    settings.pop("out")
    (tmp_path / "cache.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "cache.yaml")


def mean_norm_of(cache: Path) -> list[str]:
    return ["--mean-norm", json.dumps(ActivationCache(cache).mean_norm)]


def train(*argv: str) -> None:
    assert crosscoders_cli.main(["train", *TRAIN, *argv]) == 0


def test_cache_live_and_merged_parts_train_the_same_weights(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        run_cache(pair.config(tmp_path / f"part-{number}"), part=Part(number, 2))
    merge_parts([str(tmp_path / "part-1"), str(tmp_path / "part-2")], str(tmp_path / "parts"))
    live = ["--live", config_file(pair, tmp_path), *mean_norm_of(cache_folder)]
    sources = {"cache": ["--cache", str(cache_folder)], "merged": ["--cache", str(tmp_path / "parts")], "live": live}
    for name, argv in sources.items():
        train(*argv, "--holdout-tokens", "88", "--out", str(tmp_path / f"run-{name}"))
    weights = [(tmp_path / f"run-{name}" / "model.safetensors").read_bytes() for name in sources]
    assert weights[0] == weights[1] == weights[2]
    evaluations = [json.loads((tmp_path / f"run-{name}" / "eval.json").read_text())["rows"] for name in sources]
    for others in zip(*evaluations, strict=True):
        # Held-out tokens come in other batches when they are live, so the order of sums differs.
        assert {row["n"] for row in others} == {88}
        assert others[2]["value"] == pytest.approx(others[0]["value"], rel=1e-9)
    assert not (tmp_path / "unused").exists()


def test_without_the_number_the_scale_is_that_of_the_first_tokens_and_resume_keeps_it(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = ["--live", config_file(pair, tmp_path), "--out"]
    train(*live, str(tmp_path / "whole"))
    found = [float(v) for v in json.loads((tmp_path / "whole/run.json").read_text())["inputs"]["stream"]["mean_norm"]]
    assert found == pytest.approx(ActivationCache(cache_folder).mean_norm)  # 600 tokens are fewer than 16,384

    from crosscoders.training import checkpoint

    real = checkpoint.save_state

    def failing(out: Path, step: int, *state: object) -> None:
        real(out, step, *state)  # type: ignore[arg-type]
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_state", failing)
    assert crosscoders_cli.main(["train", *TRAIN, *live, str(tmp_path / "cut")]) == 130
    monkeypatch.setattr(checkpoint, "save_state", real)
    monkeypatch.setattr(
        "crosscoders.activations.stream.moments_of", lambda x: pytest.fail("the scale was measured again")
    )
    train(*live, str(tmp_path / "cut"))
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_live_run_is_evaluated_on_a_cache_of_its_pair_and_scaled_on_one(
    pair: Pair, cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = ["--live", config_file(pair, tmp_path), "--out", str(tmp_path / "run")]
    run_cache(pair.config(tmp_path / "other", hook_point="blocks.0.hook_resid_post", n_tokens=200))
    argv = ["train", *TRAIN, *live, "--eval-cache"]
    assert crosscoders_cli.main([*argv, str(tmp_path / "other")]) == 2
    assert "has another hook_point than" in capsys.readouterr().err
    assert crosscoders_cli.main([*argv, str(cache_folder)]) == 0
    assert f"next: crosscoders cache --config {tmp_path}/cache.yaml --out CACHE" in capsys.readouterr().err
    assert diffing_cli.main(["scale", str(tmp_path / "run")]) == 2
    assert "was not trained on a cache. Name one: --cache CACHE" in capsys.readouterr().err
    assert diffing_cli.main(["scale", str(tmp_path / "run"), "--cache", str(tmp_path / "other")]) == 2
    assert "has another hook_point" in capsys.readouterr().err
    assert diffing_cli.main(["scale", str(tmp_path / "run"), "--cache", str(cache_folder)]) == 0


def test_a_live_run_of_another_plan_in_the_same_folder_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--live", config_file(pair, tmp_path), "--out", str(tmp_path / "run"))
    config = config_file(pair, tmp_path, seed=3)
    assert crosscoders_cli.main(["train", *TRAIN, "--live", config, "--out", str(tmp_path / "run")]) == 2
    assert "holds a run with cache.hash =" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, argv, line",
    [
        ({}, ["--cache", "x"], "train needs one of the two: --cache FOLDER, or --live CONFIG.yaml"),
        ({}, ["--mean-norm", "[1.0]"], "mean_norm is [1.0]; give two numbers above 0"),
        ({}, ["--holdout-tokens", "580"], "holdout_tokens = 580 leaves 20 of 600 tokens"),
        ({"hook_point": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]}, [], "names 2 hook points; --live"),
        ({"part": "1/2"}, [], "has no effect with --live"),
        ({"bse": "x"}, [], "unknown key 'bse'; did you mean 'base'?"),
        ({"data": "no/such.jsonl"}, [], "data 'no/such.jsonl' does not exist"),
    ],
)
def test_wrong_settings_of_a_live_run_are_one_line(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], argv: list[str],
    line: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("crosscoders.activations.source.load_pair", lambda *a, **k: pytest.fail("a model was loaded"))
    live = ["--live", config_file(pair, tmp_path, **changes), "--out", str(tmp_path / "run")]
    assert crosscoders_cli.main(["train", *TRAIN, *live, *argv]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_train_without_data_and_a_config_that_is_not_there_are_one_line(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    for argv, line in [
        ([], "train needs one of the two"),
        (["--live", "/no.yaml"], "config file '/no.yaml' does not exist. Check the path of --live"),
        (["--cache", str(cache_folder), "--mean-norm", "[1.0,2.0]"], "mean_norm has no effect with cache"),
    ]:
        assert crosscoders_cli.main(["train", *TRAIN, *out, *argv]) == 2
        assert line in capsys.readouterr().err.splitlines()[-1]
