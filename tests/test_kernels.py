"""The compiled kernels equal torch: every shape of remainder, several threads, and the way out without a compiler."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crosscoders import sparse
from crosscoders.kernels import cpu, gpu

compiled = pytest.mark.skipif(cpu.library().functions is None, reason=f"kernels: {cpu.library().state}")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def entries(n_tokens: int, dict_size: int, share: float) -> sparse.Active:
    """Uneven numbers per token and per latent, some of them none."""
    pre = random(n_tokens, dict_size) * torch.linspace(0, 2, n_tokens)[:, None]
    return sparse.active(pre, torch.full((dict_size,), float(pre.flatten().quantile(1 - share))))


@compiled
@pytest.mark.parametrize("width", [3, 64, 130, 200])
def test_bags_and_dots_equal_dense_products(width: int, threads: int) -> None:
    found = entries(13, 29, 0.2)
    f = torch.zeros(13, 29).index_put((found.tokens, found.latents), found.values)
    W, y, bias = random(29, width, seed=1), random(13, width, seed=2), random(width, seed=3)
    torch.testing.assert_close(cpu.bags(found.latents, found.values, found.starts, W), f @ W)
    torch.testing.assert_close(cpu.bags(found.latents, found.values, found.starts, W, bias), f @ W + bias)
    by_latent = cpu.sort_by_key(found.latents, found.tokens, found.values, found.values.square(), 29)
    torch.testing.assert_close(cpu.bags(by_latent.ids, by_latent.values, by_latent.starts, y), f.T @ y)
    torch.testing.assert_close(by_latent.sums, f.square().sum(dim=0))
    expected = (y[found.tokens] * W[found.latents]).sum(dim=1)
    torch.testing.assert_close(cpu.dots(found.tokens, found.latents, y, W), expected)


@compiled
@pytest.mark.parametrize("n_columns", [1, 15, 16, 37])
def test_selections_equal_a_sort(n_columns: int, threads: int) -> None:
    pre, gate, weight = random(11, n_columns), random(n_columns, seed=1), torch.rand(n_columns) + 0.1
    found = cpu.select_above(pre, gate, weight, 1)  # the guess is too small
    assert torch.equal(found.tokens * n_columns + found.latents, (pre > gate).flatten().nonzero()[:, 0])
    assert torch.equal(found.values, pre[pre > gate])
    assert torch.equal(found.scaled, (pre * weight)[pre > gate])
    positive = cpu.select_above(pre, torch.zeros(n_columns), weight, 1000)
    for n in (1, len(positive.tokens) // 2):
        if n:
            kept, cut = cpu.keep_largest(cpu.Selected(*(column.clone() for column in positive)), n)
            assert torch.equal(kept.scaled, positive.scaled[positive.scaled >= positive.scaled.sort().values[-n]])
            assert float((positive.scaled >= cut).sum()) == n


@compiled
def test_the_kernels_take_ties_as_torch_does() -> None:
    pre = torch.tensor([[2.0, 1.0, 2.0, 2.0, 0.5, -1.0]])
    tokens, places, values = cpu.largest_per_token(pre, torch.ones(5), torch.tensor([0, 1, 2, 3, 5]), 2)
    assert (tokens.tolist(), places.tolist(), values.tolist()) == ([0, 0], [0, 2], [2.0, 2.0])
    found = cpu.select_above(pre, torch.zeros(6), torch.ones(6), 8)
    assert cpu.keep_largest(found, 2)[0].latents.tolist() == [0, 2]


@compiled
def test_relu_and_its_gradient_equal_torch(threads: int) -> None:
    pre, gradient, penalty = random(6, 9), random(6, 9, seed=1), random(9, seed=2)
    f, counts = pre.clone(), (pre > 0).sum(dim=0).float()
    assert torch.equal(cpu.relu_count_(f), counts) and torch.equal(f, pre.relu())
    expected = torch.where(f > 0, gradient + penalty, 0.0)
    sums = cpu.relu_backward_(gradient, f, penalty)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(sums, expected.sum(dim=0))
    assert cpu.relu_count_(torch.tensor([[torch.nan, 1.0]])).tolist() == [0, 1]


@compiled
def test_nan_is_never_selected_and_infinity_is() -> None:
    pre = torch.tensor([[torch.nan, torch.inf, 1.0, 3.0]])
    assert cpu.select_above(pre, torch.zeros(4), torch.ones(4), 8).latents.tolist() == [1, 2, 3]
    assert cpu.largest_per_token(pre, torch.ones(4), torch.arange(4), 2)[1].tolist() == [1, 3]


@compiled
def test_adam_equals_torch_and_gives_the_norms(threads: int) -> None:
    ours, other = random(7, 5), random(7, 5).requires_grad_()
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(7, 5), "exp_avg_sq": torch.zeros(7, 5)}
    adam, norms = torch.optim.Adam([other], lr=1e-2, betas=(0.8, 0.99)), torch.empty(7)
    for step in range(4):
        gradient = random(7, 5, seed=step)
        other.grad = gradient * 0.3
        adam.step()
        cpu.adam_(ours, gradient, state, scale=0.3, lr=1e-2, betas=(0.8, 0.99), norms=norms)
    torch.testing.assert_close(ours, other.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norms, ours.norm(dim=1))
    assert torch.equal(norms, cpu.row_norms(ours))  # a resumed run starts from these, bit for bit


@compiled
def test_the_split_over_threads_changes_no_bit() -> None:
    before, results = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found = entries(40, 30, 0.5)
        W = random(30, 70)
        results.append([*cpu.bags(found.latents, found.values, found.starts, W), cpu.row_norms(W), found.values])
    torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", ["MODEL_DIFFING_KERNELS=torch", "CC=false"])
def test_without_kernels_the_fast_path_is_the_same_within_rounding(setting: str, tmp_path: Path) -> None:
    """In a process of its own, since the library is loaded once."""
    code = """
import torch
from crosscoders import sparse
from crosscoders.kernels import cpu
pre = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
c, W = torch.rand(40, generator=torch.Generator().manual_seed(1)), torch.randn(40, 80)
found = sparse.WarmSelection()(pre, c, 2000)
f = torch.zeros(200, 40).index_put((found.tokens, found.latents), found.values)
torch.testing.assert_close(sparse.decode(found, W), f @ W)
print(cpu.library().state, int(found.latents.sum()), f"{float(f.double().sum()):.6f}")
"""
    name, value = setting.split("=")
    plain = {"PATH": "" if name == "CC" else os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **plain, name: value}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("torch ("), ran.stdout
    pre = random(200, 40)
    c = torch.rand(40, generator=torch.Generator().manual_seed(1))
    here = sparse.WarmSelection()(pre, c, 2000)
    assert ran.stdout.split(")")[1].split() == [
        str(int(here.latents.sum())),
        f"{float(here.values.double().sum()):.6f}",
    ]


TRITON = """
import torch
from crosscoders import sparse
from crosscoders.kernels import gpu
device = "cuda" if torch.cuda.is_available() else "cpu"
pre = torch.randn(13, 29, device=device)
found = sparse.active(pre, torch.full((29,), 0.8, device=device))
f = torch.zeros(13, 29, device=device).index_put((found.tokens, found.latents), found.values)
for width in (3, 256, 300):
    W, bias, y = (torch.randn(*shape, device=device) for shape in ((29, width), (width,), (13, width)))
    torch.testing.assert_close(gpu.bags(found.latents, found.values, found.starts, W, bias), f @ W + bias)
    torch.testing.assert_close(gpu.bags(found.latents, found.values, found.starts, W), f @ W)
    expected = (y[found.tokens] * W[found.latents]).sum(dim=1)
    torch.testing.assert_close(gpu.dots(found.tokens, found.latents, y, W), expected)
"""


@pytest.mark.skipif(not gpu.is_available(), reason="Triton is not installed")
def test_triton_programs_equal_dense_products() -> None:
    """On a GPU where there is one, else in Triton's interpreter, which has to be chosen before it is imported."""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TRITON], env={**os.environ, **interpreter}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
