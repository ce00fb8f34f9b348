"""The compiled kernels equal torch: every shape of remainder, several threads, and the way out without a compiler."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crosscoders.dictionary import selection, sparse
from crosscoders.kernels import cpu, gpu
from crosscoders.kernels.library import library

compiled = pytest.mark.skipif(library().functions is None, reason=f"kernels: {library().state}")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def entries(n_tokens: int, dict_size: int, share: float) -> selection.Active:
    """Uneven numbers per token and per latent, some of them none."""
    pre = random(n_tokens, dict_size) * torch.linspace(0, 2, n_tokens)[:, None]
    return selection.active(pre, torch.full((dict_size,), float(pre.flatten().quantile(1 - share))))


def dense(found: selection.Active, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(found.n_tokens, found.dict_size).index_put((found.tokens, found.latents), values)


@compiled
@pytest.mark.parametrize("width", [3, 64, 130, 200])
def test_bags_equal_dense_products(width: int, threads: int) -> None:
    found = entries(13, 29, 0.2)
    f = dense(found, found.values)
    W, y, bias = random(29, width, seed=1), random(13, width, seed=2), random(width, seed=3)
    torch.testing.assert_close(cpu.bags(found.latents, found.values, found.starts, W), f @ W)
    torch.testing.assert_close(cpu.bags(found.latents, found.values, found.starts, W, bias), f @ W + bias)
    by_latent = cpu.sort_by_key(found.latents, found.tokens, found.values, 29)
    torch.testing.assert_close(cpu.bags(by_latent.ids, by_latent.values, by_latent.starts, y), f.T @ y)


@compiled
@pytest.mark.parametrize("n_models", [1, 2, 3])
@pytest.mark.parametrize("d_model", [3, 64, 100])
def test_a_residual_and_its_products_equal_dense_ones(d_model: int, n_models: int, threads: int) -> None:
    found = entries(13, 29, 0.9)  # more than one group of 16 entries in a token
    width = n_models * d_model
    W, goal, bias = random(29, width, seed=1), random(13, width, seed=2), random(width, seed=3)
    for b in (bias, None):
        part = cpu.residual(found.latents, found.values, found.starts, W, b, goal, n_models, torch.empty(13, width))
        left = goal - dense(found, found.values) @ W - (0 if b is None else b)
        torch.testing.assert_close(part.left, left, rtol=1e-4, atol=1e-5)
        parts, rows = left.view(13, n_models, d_model), W.view(29, n_models, d_model)
        torch.testing.assert_close(part.squares, parts.square().sum(dim=2), rtol=1e-4, atol=1e-5)
        expected = (parts[found.tokens] * rows[found.latents]).sum(dim=2).T
        torch.testing.assert_close(part.dots, expected, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("d_model", [3, 64, 100])
def test_row_gradients_equal_dense_products(d_model: int, threads: int) -> None:
    found, other, columns = entries(13, 29, 0.3), entries(13, 7, 0.6), torch.arange(7) * 4
    left, x = random(26, 2 * d_model), random(13, 2 * d_model, seed=1)
    dots, scale, direct = random(2, len(found.tokens)), random(13, 2, seed=2), random(len(found.tokens), seed=3)
    more_dots, more_scale = random(2, len(other.tokens), seed=4), random(13, 2, seed=5)
    sets = [
        cpu.EntrySet(found.tokens, found.latents, None, found.values, dots, scale, direct),
        cpu.EntrySet(other.tokens, other.latents, columns, other.values, more_dots, more_scale, None),
    ]
    W_dec_grad, W_enc_grad, b_enc_grad, squares = cpu.row_gradients(sets, left, x, 29)
    f, f_grad = dense(found, found.values), dense(found, direct + (dots * scale[found.tokens].T).sum(dim=0))
    g, g_grad = torch.zeros(2, 13, 29)
    g[:, columns] = dense(other, other.values)
    g_grad[:, columns] = dense(other, (more_dots * more_scale[other.tokens].T).sum(dim=0))
    y, more_y = (
        (part.view(13, 2, -1) * s[:, :, None]).flatten(1)
        for part, s in zip(left.split(13), (scale, more_scale), strict=True)
    )
    torch.testing.assert_close(W_dec_grad, f.T @ y + g.T @ more_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(W_enc_grad, (f_grad + g_grad).T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b_enc_grad, (f_grad + g_grad).sum(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares, (W_dec_grad.square() + W_enc_grad.square()).sum(dim=1))
    slow = sparse._row_gradients(sets, left, x, 29)
    for a, b in zip(slow, (W_dec_grad, W_enc_grad, b_enc_grad, squares), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("n", [1, 31, 1024, 5000])
def test_the_sum_of_squares_equals_torch(n: int, threads: int) -> None:
    values = random(n)
    assert cpu.sum_squares(values) == pytest.approx(float(values.double().square().sum()), rel=1e-6)


@compiled
@pytest.mark.parametrize("n_columns", [1, 15, 16, 37])
def test_selections_equal_a_sort(n_columns: int, threads: int) -> None:
    gate, weight = random(n_columns, seed=1), torch.rand(n_columns) + 0.1
    products, bias = random(11, n_columns, seed=2), random(n_columns, seed=3)
    pre = products + bias
    found = cpu.select_above(products, bias, gate, weight, 1)  # the guess is too small
    assert torch.equal(found.tokens * n_columns + found.latents, (pre > gate).flatten().nonzero()[:, 0])
    assert torch.equal(found.values, pre[pre > gate])
    assert torch.equal(found.scaled, (pre * weight)[pre > gate])
    positive = cpu.select_above(products, bias, torch.zeros(n_columns), weight, 1000)
    for n in (1, len(positive.tokens) // 2):
        if n:
            kept, cut = cpu.keep_largest(cpu.Selected(*(column.clone() for column in positive)), n)
            assert torch.equal(kept.scaled, positive.scaled[positive.scaled >= positive.scaled.sort().values[-n]])
            assert float((positive.scaled >= cut).sum()) == n


@compiled
def test_the_kernels_take_ties_as_torch_does() -> None:
    pre = torch.tensor([[2.0, 1.0, 2.0, 2.0, 0.5, -1.0]])
    tokens, places, values = cpu.largest_per_token(pre, torch.zeros(5), torch.ones(5), torch.tensor([0, 1, 2, 3, 5]), 2)
    assert (tokens.tolist(), places.tolist(), values.tolist()) == ([0, 0], [0, 2], [2.0, 2.0])
    found = cpu.select_above(pre, torch.zeros(6), torch.zeros(6), torch.ones(6), 8)
    assert cpu.keep_largest(found, 2)[0].latents.tolist() == [0, 2]


@compiled
@pytest.mark.parametrize("is_spaced", [False, True])
def test_relu_and_its_gradient_equal_torch(is_spaced: bool, threads: int) -> None:
    f, bias, gradient, penalty = random(6, 9), random(9, seed=3), random(6, 9, seed=1), random(9, seed=2)
    if is_spaced:
        f, gradient = cpu.spaced(6, 9).copy_(f), cpu.spaced(6, 9).copy_(gradient)
    pre = f + bias
    counts, sums = cpu.relu_count_(f, bias)
    assert torch.equal(counts, (pre > 0).sum(dim=0).float()) and torch.equal(f, pre.relu())
    torch.testing.assert_close(sums, f.sum(dim=0))
    expected = torch.where(f > 0, gradient + penalty, 0.0)
    sums = cpu.relu_backward_(gradient, f, penalty)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(sums, expected.sum(dim=0))
    found = cpu.select_above(f, torch.zeros(9), bias, penalty, 1)
    assert torch.equal(found.tokens * 9 + found.latents, (f > bias).flatten().nonzero()[:, 0])
    assert cpu.relu_count_(torch.tensor([[torch.nan, 1.0]]), torch.zeros(2))[0].tolist() == [0, 1]


@compiled
@pytest.mark.parametrize("width", [5, 16, 70])
def test_rows_are_added_and_squared(width: int, threads: int) -> None:
    gradient, factors, rows = random(7, width), random(7, seed=1), random(7, width, seed=2)
    expected = gradient + factors[:, None] * rows
    squares = cpu.add_rows_(gradient, factors, rows)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(squares, expected.square().sum(dim=1))


@compiled
def test_nan_is_never_selected_and_infinity_is() -> None:
    pre = torch.tensor([[torch.nan, torch.inf, 1.0, 3.0]])
    assert cpu.select_above(pre, torch.zeros(4), torch.zeros(4), torch.ones(4), 8).latents.tolist() == [1, 2, 3]
    assert cpu.largest_per_token(pre, torch.zeros(4), torch.ones(4), torch.arange(4), 2)[1].tolist() == [1, 3]


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
        part = cpu.residual(found.latents, found.values, found.starts, W, None, random(40, 70), 2, torch.empty(40, 70))
        of_set = found.tokens, found.latents, None, found.values, part.dots, part.squares, None
        grads = cpu.row_gradients([cpu.EntrySet(*of_set)], part.left, random(40, 70), 30)
        sums = torch.tensor(cpu.sum_squares(W))
        bags = cpu.bags(found.latents, found.values, found.starts, W)
        results.append([bags, *part, *grads, sums, cpu.row_norms(W), found.values])
    torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", ["MODEL_DIFFING_KERNELS=torch", "CC=false"])
def test_without_kernels_the_fast_path_is_the_same_within_rounding(setting: str, tmp_path: Path) -> None:
    """In a process of its own, since the library is loaded once."""
    code = """
import torch
from crosscoders.dictionary import selection, sparse
from crosscoders.kernels.library import library
pre = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
c, W = torch.rand(40, generator=torch.Generator().manual_seed(1)), torch.randn(40, 80)
found = selection.WarmSelection()(pre, c, 2000)
f = torch.zeros(200, 40).index_put((found.tokens, found.latents), found.values)
torch.testing.assert_close(sparse.decode(found, W), f @ W)
print(library().state, int(found.latents.sum()), f"{float(f.double().sum()):.6f}")
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
    here = selection.WarmSelection()(pre, c, 2000)
    assert ran.stdout.split(")")[1].split() == [
        str(int(here.latents.sum())),
        f"{float(here.values.double().sum()):.6f}",
    ]


TRITON = """
import torch
from crosscoders.dictionary import selection, sparse
from crosscoders.kernels import gpu
device = "cuda" if torch.cuda.is_available() else "cpu"
pre = torch.randn(13, 29, device=device)
found = selection.active(pre, torch.full((29,), 0.8, device=device))
f = torch.zeros(13, 29, device=device).index_put((found.tokens, found.latents), found.values)
for width in (4, 256, 600):
    W, bias, y = (torch.randn(*shape, device=device) for shape in ((29, width), (width,), (13, width)))
    torch.testing.assert_close(gpu.bags(found.latents, found.values, found.starts, W, bias), f @ W + bias)
    torch.testing.assert_close(gpu.bags(found.latents, found.values, found.starts, W), f @ W)
    for n_parts in (1, 2):
        expected = (y[found.tokens] * W[found.latents]).view(-1, n_parts, width // n_parts).sum(dim=2).T
        torch.testing.assert_close(gpu.dots(found.tokens, found.latents, y, W, n_parts), expected)
"""


@pytest.mark.skipif(not gpu.is_available(), reason="Triton is not installed")
def test_triton_programs_equal_dense_products() -> None:
    """On a GPU where there is one, else in Triton's interpreter, which has to be chosen before it is imported."""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TRITON], env={**os.environ, **interpreter}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
