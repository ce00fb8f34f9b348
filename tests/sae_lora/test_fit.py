"""Fits from end to end: two dictionaries, resuming, orders of batches, rates, presets."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import POINT, adapter_weights, fit_config, gemma_scope, opened

from crosscoders import InputError
from crosscoders.training.loop import StopRequested
from sae_lora import fit
from sae_lora.cli import main
from sae_lora.fitting import loop
from sae_lora.fitting.settings import PRESETS
from sae_lora.lora.sidecar import read_sidecar


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma_scope(tmp_path_factory.mktemp("hub"))


def test_fit_and_eval_run_offline_and_close_a_part_of_the_kl(
    pair: Any, scope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    common = ["--data", pair.data, "--context-length", "40", "--batch-rows", "4", "--n-tokens", "500"]
    flags = ["--model", pair.tuned, "--dictionary", str(scope), "--rank", "4", "--lr", "1e-2", "--out", str(run)]
    assert main(["fit", *flags, *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "fit"
    assert main(["eval", str(run), *common, "--json", "--out", str(tmp_path / "eval.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    values = {row["name"]: row for row in printed["rows"]}
    assert json.loads((tmp_path / "eval.json").read_text())["rows"] == printed["rows"]
    closed = values["eval.kl_closed"]
    assert 0 < closed["low"] < closed["value"] < closed["high"] < 1
    assert values["eval.kl.plain"]["value"] == 0 and values["eval.top1.plain"]["value"] == 1
    assert values[f"eval.l0.{POINT}.before"]["value"] == values[f"eval.l0.{POINT}.after"]["value"] > 0  # LoRA is after
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < lines[0]["kl"] or len(lines) == 1
    assert main(["eval", str(run), *common]) == 0
    assert "adapted_spliced" in capsys.readouterr().out


def test_two_dictionaries_are_fitted_and_measured_together(
    pair: Any, scope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lower = tmp_path / "gemma-scope-2b-pt-res" / "layer_0" / "width_16k" / "average_l0_9"
    lower.mkdir(parents=True)
    (lower / "params.npz").write_bytes((scope / "params.npz").read_bytes())
    folder = fit(fit_config(pair, scope, dictionary=[str(scope), str(lower)]), tmp_path / "run")
    sidecar = read_sidecar(folder)
    assert [entry["hook_point"] for entry in sidecar["dictionaries"]] == ["blocks.0.hook_resid_post", POINT]
    assert sidecar["layers"] == [1, 2]  # after the lower one
    assert main(["eval", str(folder), "--data", pair.data, "--n-tokens", "200", "--json"]) == 0
    values = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert values["eval.l0.blocks.0.hook_resid_post.before"] == values["eval.l0.blocks.0.hook_resid_post.after"]
    assert values[f"eval.fve.{POINT}.before"] != values[f"eval.fve.{POINT}.after"]  # LoRA on layer 1 moves its input


def test_an_interrupted_fit_goes_on_with_the_same_bits(
    pair: Any, scope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fit_config(pair, scope, dropout=0.2, epochs=2, store="memory")
    whole = adapter_weights(fit(settings, tmp_path / "whole"))
    real, calls = loop.take_step, []
    stop_after = len(opened(settings)[3]) + 3  # in the second epoch

    def stopping(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "take_step", stopping)
    with pytest.raises(StopRequested, match=f"step {stop_after}"):
        fit(settings, tmp_path / "cut")
    assert not (tmp_path / "cut" / "adapter").exists()
    found = adapter_weights(fit(settings, tmp_path / "cut"))
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())
    n_lines = [len((tmp_path / name / "train.jsonl").read_text().splitlines()) for name in ("whole", "cut")]
    assert n_lines[0] == n_lines[1]
    assert fit(settings, tmp_path / "cut") == tmp_path / "cut" / "adapter"  # complete already
    with pytest.raises(InputError, match=r"holds a run with rank = 4, now 5"):
        fit(fit_config(pair, scope, dropout=0.2, rank=5), tmp_path / "cut")


def test_every_epoch_takes_all_batches_and_later_ones_in_other_orders() -> None:
    order = loop.batch_order(20, 3, seed=0)
    epochs = [order[:20], order[20:40], order[40:]]
    assert epochs[0] == list(range(20)) and all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert epochs[1] != epochs[0] and epochs[2] not in epochs[:2]
    assert loop.batch_order(20, 3, seed=1)[20:] != order[20:]


def test_the_rate_falls_linearly_at_the_end_if_asked(pair: Any, scope: Path) -> None:
    settings = fit_config(pair, scope, lr=1.0, lr_decay_fraction=0.4)
    assert [settings.lr_at(step, 10) for step in range(10)] == [1.0] * 7 + [0.75, 0.5, 0.25]
    assert fit_config(pair, scope, lr=1.0).lr_at(9, 10) == 1.0


def test_a_run_does_not_go_on_with_another_dictionary_at_the_same_path(pair: Any, scope: Path, tmp_path: Path) -> None:
    lower = tmp_path / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "x"
    lower.mkdir(parents=True)
    arrays = dict(np.load(scope / "params.npz"))
    np.savez(lower / "params.npz", **arrays)
    folder = fit(fit_config(pair, lower), tmp_path / "run")
    model, dictionary = (
        shutil.copytree(pair.tuned, tmp_path / "m"),
        tmp_path / "m" / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "x",
    )
    shutil.copytree(lower, dictionary)
    assert fit(fit_config(pair, dictionary, model=str(model)), tmp_path / "run") == folder  # moved, and the same
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match="holds a run with model = "):
        fit(fit_config(pair, lower, model=str(model)), tmp_path / "run")
    np.savez(lower / "params.npz", **arrays | {"b_dec": arrays["b_dec"] + 1})
    with pytest.raises(InputError, match=r"holds a run with dictionaries\.blocks\.1\.hook_resid_post\.hash"):
        fit(fit_config(pair, lower), tmp_path / "run")


def test_the_table_of_the_preset_has_the_values_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "math.md").read_text()
    table = text[text.index("**Preset `paper`**") :].split("## ")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|$", table, re.M))
    assert shown.keys() == PRESETS["paper"].keys()
    for key, value in PRESETS["paper"].items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        assert (float(shown[key].replace(",", "")) == value) if number else (shown[key] == str(value).lower()), key
