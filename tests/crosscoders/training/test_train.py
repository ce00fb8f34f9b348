"""Training: every term reaches the gradient, one seed one result, interrupted or not, on every stream."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pair

from crosscoders import (  # fmt: skip
    ActivationCache,
    CorruptData,
    Crosscoder,
    CrosscoderConfig,
    EnvironmentFault,
    InputError,
    TrainConfig,
    cached_stream,
    evaluate,
    live_stream,
    load_crosscoder,
    load_pair,
    tensor_stream,
    train,
)
from crosscoders.activations.source import ActivationSource
from crosscoders.common import files  # fmt: skip
from crosscoders.common.devices import choose_products
from crosscoders.dictionary.losses import auxiliary_loss, reconstruction_loss
from crosscoders.dictionary.metrics import ReconstructionSums
from crosscoders.dictionary.selection import WarmSelection
from crosscoders.text.tokens import tokenize_documents
from crosscoders.training.command import train_run
from crosscoders.training.loop import geometric_median, k_at
from crosscoders.training.objective import forward
from crosscoders.training.optimizer import lr_at
from crosscoders.training.settings import PRESETS, TrainSettings


def config(**changes: object) -> TrainConfig:
    """40 steps of 32 tokens, 12 latents."""
    settings: dict[str, object] = {
        "crosscoder": CrosscoderConfig(dict_size=12, k=3), "n_tokens": 1280, "batch_size": 32, "lr": 1e-2,
        "lr_warmup_steps": 2, "threshold_start_step": 5, "threshold_beta": 0.9, "dead_after_tokens": 200,
        "log_every": 10, "checkpoint_every": 10, "input_norm": "sqrt_d",
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def activations(n: int = 500, d_model: int = 6) -> torch.Tensor:
    """Sparse combinations of 8 directions, differently turned in each model."""
    g = torch.Generator().manual_seed(4)
    f = torch.rand(n, 8, generator=g) * (torch.rand(n, 8, generator=g) < 0.3)
    return torch.einsum("nj,jmd->nmd", f, torch.randn(8, 2, d_model, generator=g)) + 0.3


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------- loss terms


def squares(err: torch.Tensor) -> torch.Tensor:
    return err.square().sum(dim=2)


def test_loss_terms_on_paper() -> None:
    err = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])
    assert float(reconstruction_loss(squares(err), "norm")) == (5 + 0 + 1 + 2) / 4
    assert float(reconstruction_loss(squares(err), "squared")) == (25 + 0 + 1 + 4) / 2


@pytest.mark.parametrize("kind", ["norm", "squared"])
def test_the_gradient_of_the_reconstruction_term_equals_autograd_and_is_zero_at_zero(kind: str) -> None:
    err = activations(5).double().requires_grad_()
    (ours,) = torch.autograd.grad(reconstruction_loss(squares(err), kind), err)
    plain = err.norm(dim=2).mean() if kind == "norm" else err.square().sum() / 5
    torch.testing.assert_close(ours, torch.autograd.grad(plain, err)[0])
    none = torch.zeros(2, 2, 3, requires_grad=True)
    assert not torch.autograd.grad(reconstruction_loss(squares(none), kind), none)[0].any()


def test_the_auxiliary_term_on_paper() -> None:
    err = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])  # mean (2, 0), so the total is 1 + 1
    err_hat = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])  # misses by 4 and 9
    assert float(auxiliary_loss(squares(err - err_hat), err)) == 13 / 2
    assert float(auxiliary_loss(torch.ones(3, 1), torch.ones(3, 1, 2))) == 0  # no variation to explain


@pytest.mark.parametrize("term", ["reconstruction", "sparsity", "auxiliary"])
def test_every_term_reaches_the_gradient(term: str) -> None:
    relu = term == "sparsity"
    shape = CrosscoderConfig(dict_size=12, d_model=6, activation="relu" if relu else "batchtopk", k=None if relu else 2)
    settings = config(crosscoder=shape, l1_coefficient=0.5 if relu else 0.0, aux_coefficient=0.0 if relu else 0.5)
    model = Crosscoder(shape)
    model.init_weights_(norm=0.5, generator=torch.Generator().manual_seed(0))
    result = forward(
        model,
        settings,
        activations(32),
        dead=torch.arange(12) > 5,
        k=None if relu else 2,
        step=0,
        select=WarmSelection(),
    )
    assert set(result.terms) == {"reconstruction", "sparsity" if relu else "auxiliary"}
    result.terms[term].backward()
    assert model.W_dec.grad is not None and model.W_dec.grad.abs().sum() > 0
    assert model.W_enc.grad is not None and model.W_enc.grad.abs().sum() > 0


def test_the_auxiliary_term_trains_dead_latents_only() -> None:
    shape = CrosscoderConfig(dict_size=12, d_model=6, k=2)
    model = Crosscoder(shape)
    model.init_weights_(norm=0.5, generator=torch.Generator().manual_seed(0))
    dead = torch.arange(12) > 5
    result = forward(model, config(crosscoder=shape), activations(32), dead=dead, k=2, step=0, select=WarmSelection())
    result.terms["auxiliary"].backward()
    assert model.W_dec.grad is not None
    assert (model.W_dec.grad[~dead] == 0).all() and (model.W_dec.grad[dead] != 0).any()


def test_the_gradient_equals_finite_differences() -> None:
    shape = CrosscoderConfig(dict_size=5, d_model=3, activation="relu")
    settings = config(crosscoder=shape, l1_coefficient=0.2)
    model = Crosscoder(shape).double()
    model.init_weights_(norm=0.7, generator=torch.Generator().manual_seed(1))
    x = activations(8, 3).double()

    def loss() -> torch.Tensor:
        terms = forward(
            model, settings, x, dead=torch.zeros(5, dtype=torch.bool), k=None, step=3, select=WarmSelection()
        ).terms
        return torch.stack(list(terms.values())).sum()

    loss().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        for flat in range(0, parameter.numel(), 4):
            place = tuple(int(i) for i in np.unravel_index(flat, parameter.shape))
            before = parameter.data[place].item()
            parameter.data[place] = before + 1e-6
            up = loss().item()
            parameter.data[place] = before - 1e-6
            slope = (up - loss().item()) / 2e-6
            parameter.data[place] = before
            assert abs(slope - parameter.grad[place].item()) < 1e-5


# ---------------------------------------------------------------------------------------------------------- metrics


def fve(x: torch.Tensor, x_hat: torch.Tensor, split: int = 100) -> list[float]:
    sums = ReconstructionSums(x.shape[1], x.shape[2], 4)
    for a, b in zip(x.split(split), x_hat.split(split), strict=True):
        sums.add(a, b, torch.zeros(4, dtype=torch.int64))
    return sums.result().fve


def test_fve_on_paper() -> None:
    x = torch.tensor([[[1.0]], [[3.0]], [[5.0]]])  # mean 3, sum of squares about it 8
    assert fve(x, torch.tensor([[[1.0]], [[3.0]], [[3.0]]])) == [0.5]  # error 4


def test_fve_is_unchanged_when_data_is_rescaled_shifted_permuted_or_split() -> None:
    x = activations(300)
    x_hat = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    usual = torch.tensor(fve(x, x_hat))
    for changed in (fve(10 * x, 10 * x_hat), fve(x + 5, x_hat + 5), fve(x[order], x_hat[order]), fve(x, x_hat, 7)):
        torch.testing.assert_close(torch.tensor(changed), usual, rtol=1e-4, atol=1e-5)


def test_a_constant_error_lowers_fve_and_the_mean_as_prediction_gives_zero() -> None:
    x = activations(300)
    assert fve(x, x + 0.3)[0] < fve(x, x)[0] == 1.0
    assert abs(fve(x, x.mean(dim=0).expand_as(x))[0]) < 1e-5


def test_l0_and_dead_fraction_are_counts_over_the_whole_set() -> None:
    cc = Crosscoder(CrosscoderConfig(dict_size=4, d_model=6, activation="relu"))
    with torch.no_grad():
        cc.b_enc.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0]))
    found = evaluate(cc, activations(50).split(7))
    assert (found.l0, found.dead_fraction, found.n_tokens) == (3.0, 0.25, 50)


# ---------------------------------------------------------------------------------------------------- order of data


def test_an_epoch_covers_every_token_once_except_the_rest_of_a_buffer() -> None:
    x = torch.arange(103.0)[:, None, None].expand(-1, 2, 1)
    stream = tensor_stream(x, batch_size=10, buffer_tokens=40, seed=1)
    assert stream.steps_per_epoch == 10  # buffers of 40, 40 and 23 tokens: the last one leaves 3 over
    batches = stream.batches(0)
    first = torch.cat([next(batches)[:, 0, 0] for _ in range(10)])
    second = torch.cat([next(batches)[:, 0, 0] for _ in range(10)])
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == 100
        assert set(epoch[:40].tolist()) == set(map(float, range(40)))
    assert not torch.equal(first, second)


def test_a_stream_started_at_any_step_gives_the_same_batches() -> None:
    stream = tensor_stream(activations(103), batch_size=10, buffer_tokens=40, seed=1)
    batches = stream.batches(0)
    whole = [next(batches) for _ in range(20)]
    for step in range(20):
        assert torch.equal(next(iter(stream.batches(step))), whole[step])
    assert not torch.equal(next(iter(tensor_stream(activations(103), batch_size=10, seed=2).batches(0))), whole[0])


def test_too_few_tokens_for_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match="the data has 5 tokens, less than one batch of 10"):
        tensor_stream(activations(5), batch_size=10)


# ---------------------------------------------------------------------------------------------------- reproducibility


def run(folder: Path, settings: TrainConfig | None = None, x: torch.Tensor | None = None) -> Crosscoder:
    settings, x = settings or config(), activations() if x is None else x
    stream = tensor_stream(x, batch_size=settings.batch_size, buffer_tokens=200, seed=settings.seed)
    return train(settings, stream, folder, holdout=lambda: x.split(100))


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_one_seed_gives_one_checkpoint_and_another_seed_another(tmp_path: Path, activation: str) -> None:
    shape = CrosscoderConfig(dict_size=12, activation=activation, k=3 if activation == "batchtopk" else None)  # type: ignore[arg-type]
    settings = config(crosscoder=shape, l1_coefficient=0.1 if activation == "relu" else 0.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, replace(settings, seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    states = [(tmp_path / n / "step-00000040" / "state.safetensors").read_bytes() for n in "ab"]
    assert states[0] == states[1]


def test_training_lowers_the_loss_and_writes_what_it_says(tmp_path: Path) -> None:
    model = run(tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == [10, 20, 30, 40]
    assert steps[-1]["reconstruction"] < 0.8 * steps[0]["reconstruction"]
    assert abs(steps[-1]["loss"] - steps[-1]["reconstruction"] - steps[-1]["auxiliary"]) < 1e-6
    evaluated = json.loads((tmp_path / "a" / "eval.json").read_text())["rows"]
    found = evaluate(model, activations().split(50))
    assert {r["name"]: r["value"] for r in evaluated}["eval.fve.base"] == pytest.approx(found.fve[0], abs=1e-6)
    assert float(model.threshold) > 0
    loaded = load_crosscoder(tmp_path / "a")
    assert torch.equal(loaded.encode(activations()), model.encode(activations()))


def test_the_input_scale_makes_the_mean_norm_sqrt_d(tmp_path: Path) -> None:
    model, x = run(tmp_path / "a"), activations()
    torch.testing.assert_close(
        model.normalise(x).norm(dim=2).mean(dim=0), torch.full((2,), 6**0.5), rtol=1e-4, atol=1e-4
    )


def run_with_a_break(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
    settings: TrainConfig | None = None,
    **given: torch.Tensor,
) -> None:
    """Break at a step, then run again."""
    import crosscoders.training.loop as module

    calls, real = [], module.forward

    def breaking(*args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "forward", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(folder, settings, **given)
    assert not (folder / "model.safetensors").exists()
    monkeypatch.setattr(module, "forward", real)
    run(folder, settings, **given)


@pytest.mark.parametrize("kill_at", [15, 20, 38])
def test_a_run_that_breaks_anywhere_goes_on_to_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    run(tmp_path / "whole")
    run_with_a_break(tmp_path / "broken", monkeypatch, kill_at)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    for name in ("step", "loss", "fve_tuned"):
        logs = [[json.loads(line).get(name) for line in (tmp_path / n / "train.jsonl").read_text().splitlines()]
                for n in ("whole", "broken")]  # fmt: skip
        assert logs[0] == logs[1]


def test_8_bit_moments_train_as_well_and_go_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, shape = activations(d_model=128), CrosscoderConfig(dict_size=64, k=3)
    settings = config(crosscoder=shape, n_tokens=1920)
    run(tmp_path / "32", settings, x)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than the runs
        run(tmp_path / "8", replace(settings, adam_bits=8), x)
        run_with_a_break(tmp_path / "broken", monkeypatch, 35, replace(settings, adam_bits=8), x=x)
    assert weights(tmp_path / "8") == weights(tmp_path / "broken") != weights(tmp_path / "32")
    fve = [evaluate(load_crosscoder(tmp_path / n), x.split(100)).fve for n in ("32", "8")]
    assert min(fve[0]) > 0.9 and fve[1] == pytest.approx(fve[0], abs=0.01)
    # Weights of 4 bytes, two moments of 4 and of 1.
    size = [(tmp_path / n / "step-00000060" / "state.safetensors").stat().st_size for n in ("32", "8")]
    assert size[1] / size[0] == pytest.approx(6 / 12, abs=0.1)


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


TESTS = str(Path(__file__).parents[2])
SLOW_CHILD = """
import sys; sys.path[:0] = sys.argv[1:3]
import time, torch; torch.set_num_threads(1)
import crosscoders.training.loop as module
from test_train import run
from pathlib import Path
real, calls = module.forward, []
def slow(*args, **named):
    calls.append(1)
    if len(calls) == 25: print("ready", flush=True)
    if len(calls) > 25: time.sleep(0.05)
    return real(*args, **named)
module.forward = slow
try:
    run(Path(sys.argv[3]))
except module.StopRequested as stop:
    sys.exit(stop.exit_status)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_killed_or_asked_to_stop_goes_on_to_the_same_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    run(tmp_path / "whole")
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_CHILD, str(Path(__file__).parent), TESTS, str(tmp_path / "killed")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, number)
    assert child.wait() == (-9 if number == signal.SIGKILL else 143)
    child.stdout.close()
    states = sorted(p.parent.name for p in (tmp_path / "killed").glob("step-*/manifest.json"))
    assert states[-1] == "step-00000020" if number == signal.SIGKILL else states[-1] > "step-00000020"
    run(tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "whole")
    folder = tmp_path / "whole"
    before = weights(folder)
    state = folder / "step-00000040" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    (folder / "config.json").unlink()
    run(folder)
    assert weights(folder) == before
    assert "Going on from the state before it" in capsys.readouterr().err


def test_only_the_last_two_states_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").glob("step-*")) == ["step-00000030", "step-00000040"]


def test_another_config_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(InputError, match=r"holds a run with lr = 0.01, now 0.02. Use the same settings"):
        run(tmp_path / "a", config(lr=2e-2))


def test_a_run_from_before_a_setting_goes_on_where_that_has_its_default(tmp_path: Path) -> None:
    run(tmp_path / "a")
    path = tmp_path / "a" / "run.json"
    recorded = json.loads(path.read_text())
    del recorded["config"]["adam_bits"], recorded["config"]["crosscoder"]["activation"]
    path.write_text(json.dumps(recorded))
    (tmp_path / "a" / "config.json").unlink()
    run(tmp_path / "a")
    assert (tmp_path / "a" / "config.json").is_file()
    with pytest.raises(InputError, match="holds a run with adam_bits = 32, now 8"):
        run(tmp_path / "a", config(adam_bits=8))


def test_a_second_writer_of_a_run_is_refused(tmp_path: Path) -> None:
    with files.exclusive(tmp_path / "a"), pytest.raises(EnvironmentFault, match="is being written by process"):
        run(tmp_path / "a")


def test_cache_and_live_stream_train_the_same_weights(pair: Pair, cache_folder: Path, tmp_path: Path) -> None:
    cache, settings = ActivationCache(cache_folder), config()
    loaded = load_pair(pair.base, pair.tuned, "blocks.1.hook_resid_post")
    rows = tokenize_documents(pair.config(cache_folder).data_config(), loaded.info.tokenizer)
    source = ActivationSource(loaded, rows, hook_point="blocks.1.hook_resid_post", batch_rows=4, dtype=torch.float32)
    shared = {"batch_size": 32, "buffer_tokens": 256, "seed": 0}
    train(settings, cached_stream(cache, **shared), tmp_path / "cached")
    train(settings, live_stream(source, n_tokens=600, moments=cache.moments, **shared), tmp_path / "live")
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")


# ------------------------------------------------------------------------------------------------- schedules, faults


def test_schedules_on_paper() -> None:
    settings = config(lr=1.0, lr_warmup_steps=4, lr_decay_fraction=0.5, k_start=9, k_anneal_steps=6)
    assert [lr_at(settings, s) for s in (0, 1, 3, 20, 30, 39)] == [0.25, 0.5, 1.0, 1.0, 0.5, 0.05]
    assert [k_at(settings, s) for s in (0, 1, 3, 6, 39)] == [9, 8, 6, 3, 3]


def test_the_geometric_median_survives_a_point_on_the_guess_and_ignores_an_outlier() -> None:
    x = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[:, None]
    torch.testing.assert_close(geometric_median(x), torch.zeros(1, 2))
    outlier = torch.cat([x, torch.tensor([[[1000.0, 0.0]]])])
    assert geometric_median(outlier).norm() < 1 < outlier.mean(dim=0).norm()


def test_a_non_finite_loss_stops_before_the_step_and_names_term_step_and_state(tmp_path: Path) -> None:
    x = activations()
    folder = tmp_path / "a"
    with pytest.raises(CorruptData, match=r"loss term 'reconstruction' is (nan|inf) at step \d+\. .*lower lr"):
        run(folder, x=torch.where(torch.arange(500)[:, None, None] == 450, torch.tensor(torch.inf), x))
    states = list(folder.glob("step-*"))
    for state in states:
        assert all(torch.isfinite(t).all() for t in files.read_tensors(state / "state.safetensors").values())


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"crosscoder": {"k": 0}}, "crosscoder.k is 0; it must lie between 1 and dict_size = 12"),
        ({"crosscoder": {"k": 13}}, "crosscoder.k is 13; it must lie between 1 and dict_size = 12"),
        ({"crosscoder": {"k": None}}, "needs k, the active latents per token"),
        ({"crosscoder": {"k": 3, "activation": "relu"}}, "has no effect with activation 'relu'"),
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


def test_a_stream_of_another_width_is_refused(tmp_path: Path) -> None:
    settings = config(crosscoder=CrosscoderConfig(dict_size=12, k=3, d_model=7))
    with pytest.raises(InputError, match="the activations have d_model = 6 but the crosscoder config has 7"):
        run(tmp_path / "a", settings)


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
