"""The throughput report: every part gives rows, and nothing is timed that does not compute the same."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks.throughput import (  # fmt: skip
    adapters,
    caching,
    caching_run,
    density,
    equality,
    gpu,
    growth,
    loading,
    memory,
    ours,
    peers,
    reading,
    scaling,
    steps,
)
from benchmarks.throughput.adapters import Known, Peer
from benchmarks.throughput.steps import Shape
from benchmarks.timing import cpu_seconds, median_row, ratio_row
from crosscoders import Crosscoder, CrosscoderConfig, EnvironmentFault, InputError
from crosscoders.common.provenance import cpu_name, environment
from crosscoders.dictionary.crosscoder import batch_top_k

TINY = Shape(12, 40, 30, 3)
TINY_MODELS = caching.Size(
    vocabulary=320, d_model=16, d_mlp=24, n_layers=4, n_heads=2, d_head=8, n_rows=3, n_positions=10
)
KNOWN = Known("none", None, lambda weights, k: plain_peer(weights, k), "sum", False, False, "plain")


def require_rows(rows: list[dict[str, Any]], *names: str) -> None:
    """The documented fields, in JSON, and these names in this order."""
    assert [row["name"] for row in rows] == list(names)
    for row in json.loads(json.dumps(rows)):
        assert set(row) - {"note"} == {"name", "value", "unit", "n", "low", "high"}
        assert math.isfinite(row["value"]) and row["value"] > 0 and row["unit"] and row["n"] >= 1
        assert row["low"] is None if row["n"] == 1 else row["low"] <= row["value"] <= row["high"]


# --------------------------------------------------------------------------------------------------- rows of each part


def test_rows_of_steps() -> None:
    name = "throughput.step.12x40x30x3"
    tail = ("ratio_to_encode", "speedup_over_dense", "tokens_per_second", "encode.gflop_per_second")
    require_rows(ours.step_rows(TINY, n_rounds=2), *(f"{name}.{end}" for end in tail))
    require_rows(ours.step_rows(TINY, dead_share=0.5, n_rounds=2), *(f"{name}.aux.{end}" for end in tail))
    ends = ("share_of_dense_roof", "speedup_over_dense", "tokens_per_second")
    require_rows(ours.relu_rows(TINY, n_rounds=2), *(f"throughput.step.12x40x30.l1.{end}" for end in ends))


def test_rows_of_growth() -> None:
    fields = ("d_model", "dict_size", "batch", "k", "n_models")
    names = [f"throughput.step.growth.{field}_x2" for field in fields]
    require_rows(growth.step_rows(TINY, n_rounds=2), *names)
    names = [f"throughput.cache.growth.{name}" for name in ("tokens_x2", "vocabulary_x4")]
    require_rows(growth.cache_rows(TINY_MODELS, n_rounds=2), *names)


def test_rows_of_caching_and_saelens() -> None:
    made = caching.make_pair(TINY_MODELS)
    require_rows(caching.cache_rows("a", made, n_rounds=2), "a.ratio_to_truncated", "a.speedup_over_full_forward")
    require_rows(caching.saelens_rows("a", made, n_rounds=2), "a.ratio_to_saelens")


def test_rows_of_reading_and_scaling() -> None:
    require_rows(reading.read_rows(n_tokens=64, d_model=4, batch=16), "throughput.read.speedup_over_row_indexed_memmap")
    ends = ("ratio_to_encode", "speedup_over_per_target", "speedup_over_per_target_linear")
    found = scaling.scaling_rows(TINY, n_batches=2, n_rounds=2)
    require_rows(found, *(f"throughput.scaling.12x40x30x3.{end}" for end in ends))


def test_rows_of_gpu_run_on_a_cpu_too() -> None:
    found = gpu.step_rows(TINY, device="cpu", n_rounds=2, clock=cpu_seconds)
    ends = ("ratio_to_encode_bf16", "speedup_over_dense_bf16", "tokens_per_second")
    require_rows(found, *(f"throughput.gpu.step.12x40x30x3.{end}" for end in ends))
    assert torch.get_float32_matmul_precision() == "highest"


def test_rows_of_a_whole_caching_run_and_of_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching_run, "CONTEXT", 32)
    size = caching.Size(vocabulary=2100, d_model=16, d_mlp=24, n_layers=2, n_heads=2, d_head=8)
    ends = ("tokens_per_second", "ratio_to_truncated", "waited_for_writer")
    measured = caching_run.rows(caching.make_pair(size), tmp_path, batch_rows=[4], n_rows=8, n_rounds=1)
    require_rows(measured, *(f"throughput.gpu.cache.gemma-2-2b.run.4x32.{end}" for end in ends))
    measured = density.rows(TINY, name="a", n_rounds=2, shares=(0.01, 0.1))
    require_rows(measured, "a.dense_over_sparse.0.01", "a.dense_over_sparse.0.1")


def test_memory_of_a_fresh_process_holds_at_least_weights_gradients_and_moments() -> None:
    shape = Shape(64, 2048, 64, 4)
    weights = 2 * shape.n_models * shape.d_model * shape.dict_size * 4 / 2**20
    for found in memory.measure("ours", shape, 1):  # none where the system is not Linux
        assert 4 * weights < found < 40 * weights


def test_intervals_are_quartiles_of_ratios_taken_round_by_round() -> None:
    row = ratio_row("a", [2.0, 8.0, 3.0], [1.0, 2.0, 1.0], "times", "why")
    assert (row["value"], row["low"], row["high"], row["n"], row["note"]) == (3, 2, 4, 3, "why")
    assert median_row("a", [5.0], "MiB") == {"name": "a", "value": 5, "unit": "MiB", "n": 1, "low": None, "high": None}


# ------------------------------------------------------------------------------------------------ equality before time


def plain_peer(weights: Crosscoder, k: int, fault: str = "") -> Peer:
    """BatchTopK as a plain autograd program, with one fault if asked for."""
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in weights.parameters()]
    W_enc, b_enc, W_dec, b_dec = parameters

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        positive = (x.flatten(1) @ W_enc.flatten(0, 1) + b_enc).relu()
        norms = W_dec.norm(dim=2)
        scaled = positive * (norms.pow(2).sum(dim=1).sqrt() if fault == "norm" else norms.sum(dim=1))
        latents = positive * batch_top_k(scaled.detach(), k + (fault == "k"))
        x_hat = (latents @ W_dec.flatten(1)).view_as(x) + (0 if fault == "bias" else b_dec)
        return latents * (2 if fault == "scale" else 1), x_hat

    def loss(err: Tensor) -> Tensor:
        return err.norm(dim=2).mean()

    def step(x: Tensor) -> float:
        value = (2 if fault == "loss" else 1) * loss(x - look(x)[1])
        value.backward()
        with torch.no_grad():
            for p in parameters:
                assert p.grad is not None or fault == "bias"
                p -= 0 if fault == "idle" or p.grad is None else 0.1 * p.grad
                p.grad = None
        return value.item()

    return Peer(step, look, loss)


def test_a_peer_that_computes_the_same_is_accepted() -> None:
    equality.check("plain", KNOWN, plain_peer, peers.CHECK_SHAPE)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("norm", "selects other entries"), ("k", "selects other entries"), ("scale", "gives its latents other values"),
        ("bias", "reconstructs something else"), ("loss", "has loss"), ("idle", "does not train"),
    ],
)  # fmt: skip
def test_a_peer_that_computes_something_else_is_refused(fault: str, message: str) -> None:
    with pytest.raises(equality.Unequal, match=message):
        equality.check("plain", KNOWN, lambda weights, k: plain_peer(weights, k, fault), peers.CHECK_SHAPE)


def test_entries_at_the_cut_may_differ() -> None:
    weights = equality.random_weights(TINY, KNOWN)
    latents, distance = equality.our_latents(weights, steps.planted(TINY, 1)[0], TINY.k, per_token=False)
    assert int((latents > 0).sum()) == TINY.k * TINY.batch
    assert float(distance[latents > 0].min()) == 0  # the smallest of them is the cut


def test_per_token_rule_takes_k_of_each_token() -> None:
    weights = equality.random_weights(TINY, KNOWN)
    latents, _ = equality.our_latents(weights, steps.planted(TINY, 1)[0], TINY.k, per_token=True)
    assert (latents > 0).sum(dim=1).tolist() == [TINY.k] * TINY.batch


@pytest.mark.parametrize("name", [name for name, known in adapters.PEERS.items() if known.pip])
def test_adapters_of_installed_packages_hold_what_they_claim(name: str) -> None:
    try:
        build = loading.load(name)
    except EnvironmentFault as error:
        pytest.skip(str(error))
    equality.check(name, adapters.PEERS[name], build, peers.CHECK_SHAPE)


def test_peers_are_timed_in_one_loop_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.PEERS, "plain", KNOWN)
    found = peers.time_rows(TINY, {"plain": plain_peer}, n_rounds=2)
    ends = ("ratio_to_plain", "plain.ratio_to_encode", "plain.tokens_per_second")
    require_rows(found, *(f"throughput.step.12x40x30x3.{end}" for end in ends))


def test_a_peer_that_is_not_there_or_not_equal_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weights: Crosscoder, k: int) -> Peer:
        return plain_peer(weights, k, "norm")

    only = {
        "missing": KNOWN._replace(package="no_such_package", pip="no-such-package"),
        "wrong": KNOWN._replace(package="json", pip="wrong", build=wrong),
    }
    for module in (peers, loading):
        monkeypatch.setattr(module, "PEERS", only)
    found = peers.rows(quick=True, checkouts={}, installed=True)
    assert found.rows == []
    assert "pip install no-such-package" in found.left_out["missing"] and "selects other" in found.left_out["wrong"]


def test_steps_with_other_losses_are_not_compared() -> None:
    batches = [torch.ones(2, 2, 3)]
    steps.require_close("a", lambda x: 1.0, lambda x: 1.00001, batches, 1e-4)
    for other in (1.1, math.nan):
        with pytest.raises(RuntimeError, match="times do not compare"):
            steps.require_close("a", lambda x: 1.0, lambda x, other=other: other, batches, 1e-4)  # type: ignore[misc]


def test_betas_that_differ_are_not_compared() -> None:
    good = {"beta_base_error": torch.tensor([1.0, 2.0])}
    scaling.require_equal(good, {"beta_base_error": torch.tensor([1.0, 2.00001])})
    with pytest.raises(RuntimeError, match=r"beta_base_error.*do not compare"):
        scaling.require_equal(good, {"beta_base_error": torch.tensor([1.0, 2.1])})


def test_per_target_error_beta_on_paper() -> None:
    # one token, one active latent f = 2 with d_base = (1, 0), d_tuned = (0, 1): x_base = (3, 4), x_hat_base = (2, 0),
    # T = x_base - x_hat_base + f d_base = (3, 4); beta = 2 * 4 / (1 * 4)
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=1, k=1, d_model=2)).requires_grad_(False)
    crosscoder.b_enc.fill_(2.0)
    crosscoder.W_dec.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    x = torch.tensor([[[3.0, 4.0], [7.0, 5.0]]])
    assert scaling.per_target(crosscoder, [x], 0, "error").tolist() == [2.0]


def test_other_activations_than_ours_are_not_compared() -> None:
    made = caching.make_pair(TINY_MODELS)
    readers: list[Callable[[Tensor], Tensor]] = [lambda ids: torch.zeros(*ids.shape, 16)] * 2
    with pytest.raises(RuntimeError, match="reads other activations"):
        caching.saelens_rows("a", made, n_rounds=2, readers=readers)


# --------------------------------------------------------------------------------------------- loading, command, report


def test_importing_a_checkout_leaves_modules_paths_and_torch_as_they_were(tmp_path: Path) -> None:
    package = tmp_path / "src" / "crosscode"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torch\nprint('hello')\ntorch.Tensor.backward = lambda *_: None\n")
    path, backward = list(sys.path), torch.Tensor.backward
    loading.load("crosscode", tmp_path)
    assert torch.Tensor.backward is backward
    assert sys.path == path and "crosscode" not in sys.modules


def test_a_checkout_with_a_missing_dependency_names_it(tmp_path: Path) -> None:
    (tmp_path / "crosscode").mkdir()
    (tmp_path / "crosscode" / "__init__.py").write_text("import no_such_module\n")
    with pytest.raises(EnvironmentFault, match="no_such_module"):
        peers.rows(quick=True, checkouts={"crosscode": tmp_path}, installed=False)


def test_wrong_checkouts_are_refused_in_one_line(tmp_path: Path) -> None:
    for given, message in (
        ("crosscode", "is not NAME=FOLDER"),
        (f"croscode={tmp_path}", "did you mean 'crosscode'"),
        (f"crosscode={tmp_path / 'nowhere'}", "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            loading.read_checkouts([given])
    with pytest.raises(InputError, match="no package 'crosscode'"):
        loading.load("crosscode", tmp_path)


def test_the_command_runs_one_part_and_keeps_it_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "rows", lambda quick: reading.read_rows(n_tokens=64, d_model=4, batch=16))
    assert command.main(["run", "throughput", "--only", "read", "--quick", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "throughput-read-quick.json").read_text())
    assert kept["config"] == {"quick": True, "only": ["read"]} and kept["environment"]["cpu"] == cpu_name()
    assert "| throughput.read.speedup_over_row_indexed_memmap |" in capsys.readouterr().out
    assert command.main(["report", "--out", str(tmp_path)]) == 0
    assert kept["date"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["throughput", "--only", "stepps"], "did you mean 'steps'"),
        (["planted", "--peers"], "planted takes no --peers"),
        (["throughput", "--only", "peers", "--checkout", "crosscode"], "NAME=FOLDER"),
    ],
)
def test_wrong_options_leave_with_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["run", *words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_notes_and_what_was_left_out_are_printed_below_the_table() -> None:
    rows = [
        median_row("a", [1.0, 2.0], "s", "first"),
        median_row("b", [3.0], "s"),
        median_row("c", [1.0], "s", "first"),
    ]
    found = {"name": "n", "rows": rows, "left_out": {"p": "why"}, "environment": environment(), "date": "2026-11-21"}
    printed = command.markdown(found)
    assert "| a [1] | 1.5 |" in printed and "| b | 3 |" in printed and "| c [1] |" in printed
    assert "\n1. first\n" in printed and "Left out: p (why)" in printed and cpu_name() in printed
