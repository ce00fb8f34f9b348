"""Schedules, presets, and settings that are refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from training_runs import config, run

from crosscoders import (
    CrosscoderConfig,
    EnvironmentFault,
    InputError,
)
from crosscoders.common.devices import choose_products
from crosscoders.training.command import train_run
from crosscoders.training.loop import k_at
from crosscoders.training.optimizer import lr_at
from crosscoders.training.settings import PRESETS, TrainSettings


def test_schedules_on_paper() -> None:
    settings = config(lr=1.0, lr_warmup_steps=4, lr_decay_fraction=0.5, k_start=9, k_anneal_steps=6)
    assert [lr_at(settings, s) for s in (0, 1, 3, 20, 30, 39)] == [0.25, 0.5, 1.0, 1.0, 0.5, 0.05]
    assert [k_at(settings, s) for s in (0, 1, 3, 6, 39)] == [9, 8, 6, 3, 3]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"crosscoder": {"k": 0}}, "crosscoder.k is 0; it must lie between 1 and dict_size = 12"),
        ({"crosscoder": {"k": 13}}, "crosscoder.k is 13; it must lie between 1 and dict_size = 12"),
        ({"crosscoder": {"k": 3, "d_model": -1}}, "d_model is -1; give a number from 1"),
        ({"crosscoder": {"k": None}}, "needs k, the active latents per token"),
        ({"crosscoder": {"k": 3, "activation": "relu"}}, "has no effect with activation 'relu'"),
        (
            {"crosscoder": {"activation": "relu"}},
            "'relu' with l1_coefficient = 0 has nothing that makes latents sparse",
        ),
        ({"k_start": 9}, "k_start = 9 differs from crosscoder.k = 3 but k_anneal_steps is 0"),
        ({"k_anneal_steps": 9}, "k_anneal_steps = 9 needs k_start"),
        ({"k_start": 40, "k_anneal_steps": 5}, "k_start is 40; it must lie between 1 and dict_size"),
        ({"l1_coefficient": 0.1}, "l1_coefficient and l1_warmup_steps have no effect with activation 'batchtopk'"),
        ({"lr_warmup_steps": 40}, "lr_warmup_steps = 40 but the run has 40 steps, so it would end before the warm-up"),
        ({"k_start": 9, "k_anneal_steps": 41}, "k_anneal_steps = 41 but the run has 40 steps"),
        ({"k_aux": 0}, "k_aux is 0; give a number above 0"),
        ({"lr": 0.0}, "lr is 0.0; give a number above 0"),
        ({"n_tokens": 31}, "n_tokens = 31 is less than one batch of 32"),
        ({"lr_decay_fraction": 1.5}, "lr_decay_fraction is 1.5; give a number from 0 to 1"),
    ],
)
def test_contradictions_are_refused_when_the_config_is_made(changes: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        if "crosscoder" in changes:
            changes = {"crosscoder": CrosscoderConfig(**{"dict_size": 12, **changes["crosscoder"]})}  # type: ignore[dict-item]
        config(**changes)


def test_the_presets_are_the_published_recipes() -> None:
    l1, topk = PRESETS["paper-l1"], PRESETS["paper-batchtopk"]
    for preset in (l1, topk):
        assert preset["crosscoder.dict_size"] == 32 * 2304
        assert (preset["batch_size"], preset["lr"], preset["lr_warmup_steps"], preset["seed"]) == (2048, 1e-4, 1000, 42)
    assert (l1["l1_coefficient"], l1["decoder_init_norm"]) == (0.041, 0.005)
    assert (topk["crosscoder.k"], topk["decoder_init_norm"], topk["aux_coefficient"]) == (100, 1.0, 1 / 32)


def test_bfloat16_products_need_a_cpu_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosscoders.common.devices.has_fast_bfloat16", lambda: False)
    with pytest.raises(EnvironmentFault, match=r"emulated by this CPU.*Use --products float32"):
        choose_products("bfloat16", torch.device("cpu"))
    assert choose_products("auto", torch.device("cpu")) == torch.float32
    assert choose_products("auto", torch.device("cuda")) == torch.bfloat16


def test_8_bit_moments_that_would_mix_latents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one latent, but n_models \* d_model is 12\. Leave adam_bits at 32"):
        run(tmp_path / "run", config(adam_bits=8))


def test_8_bit_moments_without_torchao_are_refused_before_anything_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else real(name))
    settings = TrainSettings(cache=str(tmp_path / "nowhere"), out=str(tmp_path / "run"), adam_bits=8)
    with pytest.raises(EnvironmentFault, match=r"adam_bits 8 needs the package torchao\. Run: pip install"):
        train_run(settings)
