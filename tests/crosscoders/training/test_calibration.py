"""The inference threshold: L0 at inference is k, whatever the length of the run."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from crosscoders import Crosscoder, CrosscoderConfig, InputError, TrainConfig, evaluate, tensor_stream, train
from crosscoders.activations.scored import Moments
from crosscoders.training.calibration import threshold_for
from crosscoders.training.settings import PRESETS, fit_to_length
from crosscoders.training.start import unequal_spread


def planted(n_tokens: int, seed: int = 0) -> torch.Tensor:
    """Sparse combinations of 60 directions, 5% of them active."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(60, 2, 24, generator=torch.Generator().manual_seed(9))
    active = torch.rand(n_tokens, 60, generator=generator) < 0.05
    return torch.einsum("nj,jmd->nmd", active * torch.rand(n_tokens, 60, generator=generator), directions)


def l0(crosscoder: Crosscoder, x: torch.Tensor) -> float:
    return float((crosscoder.encode(x) > 0).sum(dim=1).float().mean())


def test_the_threshold_lets_exactly_k_latents_of_each_token_through_on_average() -> None:
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=30, k=4, d_model=24)).requires_grad_(False)
    crosscoder.init_weights_(norm=0.5, generator=torch.Generator().manual_seed(1))
    x = planted(501)
    threshold = threshold_for(crosscoder, x.split(100), 4)
    assert threshold is not None
    crosscoder.threshold.fill_(threshold)
    scaled = torch.relu(crosscoder.pre_acts(crosscoder.normalise(x))) * crosscoder.code_norm
    by_sorting = scaled.flatten().sort(descending=True).values
    assert by_sorting[4 * 501] < threshold < by_sorting[4 * 501 - 1]
    assert l0(crosscoder, x) == pytest.approx(4, abs=1e-6)


def test_where_too_few_latents_are_positive_all_of_them_are_active() -> None:
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=6, k=5, d_model=24)).requires_grad_(False)
    crosscoder.init_weights_(norm=0.5, generator=torch.Generator().manual_seed(1))
    assert threshold_for(crosscoder, [planted(50)], 5) == 0.0
    assert threshold_for(crosscoder, [], 5) is None


@pytest.mark.parametrize("n_steps, k", [(30, 3), (200, 3), (200, 12)])
def test_l0_on_held_out_tokens_is_k_after_a_run_of_any_length(tmp_path: Path, n_steps: int, k: int) -> None:
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=64, k=k), n_tokens=n_steps * 128, batch_size=128, lr=3e-3,
        lr_warmup_steps=5, input_norm="centred",
    )  # fmt: skip
    held_out = planted(2000, seed=1)
    stream = tensor_stream(planted(4000), batch_size=128)
    with_holdout = train(config, stream, tmp_path / "held-out", holdout=lambda: held_out.split(500))
    assert l0(with_holdout, held_out) == pytest.approx(k, rel=1e-3)
    without = train(config, stream, tmp_path / "last")
    assert l0(without, held_out) == pytest.approx(k, rel=0.05)


def test_held_out_tokens_are_read_once_for_an_evaluation(tmp_path: Path) -> None:
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=64, k=3), n_tokens=40 * 128, batch_size=128, lr=3e-3, lr_warmup_steps=5,
        eval_every=20,
    )  # fmt: skip
    held_out, n_read = planted(2000, seed=1), 0

    def holdout() -> Iterator[torch.Tensor]:
        nonlocal n_read
        for x in held_out.split(500):
            n_read += len(x)
            yield x

    crosscoder = train(config, tensor_stream(planted(4000), batch_size=128), tmp_path, holdout=holdout)
    assert n_read == 2 * 2000, "at step 20, and at the end"
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert [rows["eval.fve.base"], rows["eval.fve.tuned"]] == evaluate(crosscoder, held_out.split(500)).fve


@pytest.mark.parametrize("activation, n_waiting", [("batchtopk", 8), ("relu", 2)])
def test_no_more_held_out_batches_wait_in_memory_than_calibration_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: Literal["relu", "batchtopk"], n_waiting: int
) -> None:
    monkeypatch.setattr("crosscoders.training.calibration.MAX_TOKENS", 600)
    topk = activation == "batchtopk"
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=64, k=3 if topk else None, activation=activation), n_tokens=5 * 128,
        batch_size=128, lr_warmup_steps=1, l1_coefficient=0.0 if topk else 0.1,
    )  # fmt: skip
    batches: list[weakref.ref[torch.Tensor]] = []
    largest = 0

    def holdout() -> Iterator[torch.Tensor]:
        nonlocal largest
        for start in range(0, 4000, 100):
            x = planted(4000, seed=1)[start : start + 100].clone()
            batches.append(weakref.ref(x))
            largest = max(largest, sum(batch() is not None for batch in batches))
            yield x

    train(config, tensor_stream(planted(4000), batch_size=128), tmp_path, holdout=holdout)
    assert len(batches) == 40 and largest <= n_waiting


def test_the_tracked_threshold_alone_would_be_far_off_in_a_short_run(tmp_path: Path) -> None:
    """The control of the test above: what training tracks remembers the young model."""
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=64, k=3), n_tokens=200 * 128, batch_size=128, lr=3e-3, lr_warmup_steps=5,
        threshold_start_step=10, checkpoint_every=200,
    )  # fmt: skip
    crosscoder = train(config, tensor_stream(planted(4000), batch_size=128), tmp_path / "run")
    from safetensors.torch import load_file

    tracked = load_file(tmp_path / "run" / "step-00000200" / "state.safetensors")
    crosscoder.threshold.fill_(float(next(value for name, value in tracked.items() if name.endswith("threshold"))))
    assert abs(l0(crosscoder, planted(2000, seed=1)) - 3) > 0.15 * 3


def test_centred_inputs_have_mean_0_and_mean_squared_norm_d_model(tmp_path: Path) -> None:
    x = planted(3000) + torch.tensor([50.0, -3.0])[None, :, None]
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=16, k=2), n_tokens=1280, batch_size=128, lr_warmup_steps=1,
        input_norm="centred",
    )  # fmt: skip
    crosscoder = train(config, tensor_stream(x, batch_size=128), tmp_path / "run")
    inside = crosscoder.normalise(x)
    torch.testing.assert_close(inside.mean(dim=0), torch.zeros(2, 24), rtol=0, atol=1e-4)
    torch.testing.assert_close(inside.square().sum(dim=2).mean(dim=0), torch.full((2,), 24.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(crosscoder.decode(crosscoder.encode(x)), crosscoder.fold()(x), rtol=1e-3, atol=1e-3)


def test_activations_that_do_not_vary_cannot_be_centred(tmp_path: Path) -> None:
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=4, k=1), n_tokens=64, batch_size=32, lr_warmup_steps=0,
        input_norm="centred",
    )  # fmt: skip
    with pytest.raises(InputError, match="do not vary"):
        train(config, tensor_stream(torch.ones(100, 2, 3), batch_size=32), tmp_path / "run")


def test_a_preset_keeps_its_schedule_at_its_own_length_and_shortens_it_for_shorter_runs() -> None:
    preset = PRESETS["paper-batchtopk"]
    assert {**preset, **fit_to_length(preset, 200_000_000, 2048)} == fit_to_length(preset, 200_000_000, 2048)
    assert fit_to_length(preset, 200_000_000, 2048)["lr_warmup_steps"] == 1000
    short = fit_to_length(preset, 204_800, 2048)  # 100 steps
    assert (short["lr_warmup_steps"], short["threshold_start_step"], short["dead_after_tokens"]) == (10, 50, 20_480)


def test_models_of_unequal_spread_are_warned_of_without_a_scale() -> None:
    def moments(base: float, tuned: float) -> Moments:
        """Means of length 3 in both models, which do not count."""
        return Moments([[3.0, 0.0], [0.0, 3.0]], [3.0, 3.0], [9 + base**2, 9 + tuned**2])

    assert unequal_spread(moments(1.0, 1.19)) == unequal_spread(moments(1.19, 1.0)) == ""
    for base, tuned in ((1.0, 1.25), (1.25, 1.0)):
        words = unequal_spread(moments(base, tuned))
        assert f"is {base:.4g} in the base model and {tuned:.4g} in the tuned one" in words
        assert words.startswith("warning: input_norm is 'none'") and words.endswith("Use --input-norm centred")
    assert unequal_spread(Moments([[0.0]], [1.0], [1.0])) == ""  # one model
