"""The fast path equals the dense one: selection, products, gradients, trajectories."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch

from crosscoders import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoders.dictionary import selection, sparse
from crosscoders.training.objective import forward
from crosscoders.training.optimizer import Optimizer, total_norm


def dense(entries: selection.Active) -> torch.Tensor:
    return torch.zeros(entries.n_tokens, entries.dict_size).index_put((entries.tokens, entries.latents), entries.values)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_active_decode_transposed_and_sums_equal_dense_products() -> None:
    pre, gate, W, y = random(9, 7), torch.rand(7), random(7, 5, seed=1), random(9, 4, seed=2)
    f = torch.where(pre > gate, pre, 0.0)
    entries = selection.active(pre, gate)
    assert torch.equal(dense(entries), f)
    torch.testing.assert_close(sparse.decode(entries, W), f @ W)
    torch.testing.assert_close(sparse.transposed(entries, y), f.T @ y)
    found = sparse.per_latent(entries)
    assert torch.equal(found.n, (f > 0).sum(dim=0))
    torch.testing.assert_close(found.total, f.double().sum(dim=0))
    torch.testing.assert_close(found.square_total, f.double().square().sum(dim=0))
    assert torch.equal(found.largest, f.amax(dim=0))


@pytest.mark.parametrize("part_entries", [1, 8, 12, 1000])  # 1, 2, 3 and all latents in a part
def test_parts_of_the_transposed_product_are_the_rows_of_all_active_latents(
    part_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "PART_ENTRIES", part_entries)
    pre, y = random(9, 7), random(9, 4, seed=2)
    pre[:, 3] = -1.0  # never active
    f = torch.relu(pre)
    whole = torch.zeros(7, 4)
    for latents, rows in sparse.transposed_parts(selection.active(pre, torch.zeros(7)), y):
        assert rows.numel() <= max(part_entries, 4) and 3 not in latents
        assert not whole[latents].any()  # each has one turn
        whole[latents] = rows
    torch.testing.assert_close(whole, f.T @ y)


def test_nothing_active_gives_zeros() -> None:
    entries = selection.active(random(3, 4), torch.full((4,), torch.inf))
    assert torch.equal(sparse.decode(entries, random(4, 5)), torch.zeros(3, 5))
    assert torch.equal(sparse.transposed(entries, random(3, 2)), torch.zeros(4, 2))
    assert not list(sparse.transposed_parts(entries, random(3, 2)))


@pytest.mark.parametrize("jump", [1.0, 0.01, 100.0])
def test_the_warm_selection_is_exact_even_when_the_data_jump(jump: float) -> None:
    select, c = selection.WarmSelection(), torch.rand(50) + 0.5
    for step in range(6):
        pre = random(40, 50, seed=step) * (jump if step == 3 else 1.0)
        expected = (pre.relu() * c).flatten().topk(40 * 3).indices.sort().values
        found = select(pre, c, 40 * 3)
        assert torch.equal(found.tokens * 50 + found.latents, expected)
        assert torch.equal(found.values, pre.flatten()[expected])
    before = select.n_retries
    assert jump == 1.0 or before > 0
    select(random(40, 50, seed=5), c, 40 * 3)
    assert select.n_retries == before  # the same data again: the warm threshold suffices


def test_ties_at_the_cut_keep_exactly_n_and_too_few_positive_entries_are_all_kept() -> None:
    pre = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, -1.0]])
    found = selection.WarmSelection()(pre, torch.ones(3), 3)
    assert dense(found).tolist() == [[1.0, 1.0, 0.0], [0.0, 2.0, 0.0]]
    assert len(selection.WarmSelection()(pre, torch.ones(3), 6).values) == 5
    assert len(selection.WarmSelection()(-pre.abs(), torch.ones(3), 6).values) == 0
    zero_norm = selection.WarmSelection()(pre, torch.tensor([1.0, 0.0, 1.0]), 6)
    assert 1 not in zero_norm.latents.tolist()


def test_the_largest_of_some_columns_for_each_token() -> None:
    pre, c, columns = random(6, 8), torch.rand(8), torch.tensor([1, 4, 5, 7])
    entries = selection.largest_per_token(pre, c, columns, 2)
    found = torch.zeros(6, 8).index_put((entries.tokens, entries.latents), entries.values)
    for n in range(6):
        ranked = sorted(columns.tolist(), key=lambda j: -float(pre[n, j].relu() * c[j]))[:2]
        expected = torch.zeros(8)
        expected[ranked] = pre[n, ranked].relu()
        assert torch.equal(found[n], expected)


@pytest.mark.parametrize("k", [1, 3, 7, 50])
def test_ties_at_a_token_cut_go_to_the_lower_latents(k: int) -> None:
    pre = (2 * random(40, 30)).round()  # a few values only, so nearly every cut has ties
    columns = (torch.arange(30) % 3 > 0).nonzero().squeeze(1)
    entries = selection.largest_per_token(pre, torch.ones(30), columns, k)
    for n in range(40):
        ranked = sorted(columns.tolist(), key=lambda j: (-float(pre[n, j]), j))[:k]
        expected = sorted(j for j in ranked if pre[n, j] > 0)
        assert entries.latents[entries.tokens == n].tolist() == expected


def test_nan_is_never_selected_and_infinity_is() -> None:
    pre = torch.tensor([[torch.nan, torch.inf, 1.0, 3.0]])
    assert selection.active(pre, torch.zeros(4)).latents.tolist() == [1, 2, 3]
    assert selection.largest_per_token(pre, torch.ones(4), torch.arange(1, 4), 2).latents.tolist() == [1, 3]


def setting(
    code_norm: str, reconstruction: str, dtype: torch.dtype, **other: Any
) -> tuple[Crosscoder, TrainConfig, torch.Tensor]:
    shape = CrosscoderConfig(**{"dict_size": 20, "d_model": 6, "k": 3, "code_norm": code_norm, **other})
    config = TrainConfig(
        crosscoder=shape, n_tokens=6400, batch_size=64, reconstruction=reconstruction, lr_warmup_steps=10,
        threshold_start_step=5,
        aux_coefficient=0.0 if shape.k is None else 0.5, k_aux=None if shape.k is None else 2,
        l1_coefficient=1.0 if shape.k is None else 0.0,
    )  # type: ignore[arg-type]  # fmt: skip
    model = Crosscoder(shape)
    model.init_weights_(norm=0.5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.W_dec.add_(0.1 * random(20, 2, 6, seed=2))
    return model.to(dtype), config, random(64, 2, 6, seed=3).to(dtype) + 0.2


@pytest.mark.parametrize("n_dead", [0, 8])
@pytest.mark.parametrize("reconstruction", ["norm", "squared"])
@pytest.mark.parametrize("code_norm", ["sum", "concat", "none"])
def test_gradients_equal_dense_autograd(code_norm: str, reconstruction: str, n_dead: int) -> None:
    model, config, x = setting(code_norm, reconstruction, torch.float64)
    dead = torch.arange(20) < n_dead
    terms = forward(model, config, x, dead=dead, k=3, step=0, select=selection.WarmSelection()).terms
    expected = reference.dense_terms(model, config, x, dead=dead, k=3)
    assert set(terms) == set(expected)
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    fast = torch.autograd.grad(sum(terms.values(), torch.zeros(())), parameters)
    slow = torch.autograd.grad(sum(expected.values(), torch.zeros(())), parameters)
    for a, b in zip(fast, slow, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("density", [0.0, 1.0])  # the dense and the sparse path
@pytest.mark.parametrize("code_norm", ["sum", "concat", "none"])
def test_l1_gradients_equal_dense_autograd(code_norm: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosscoders.training.objective.SPARSE_DENSITY", {"cpu": density})
    model, config, x = setting(code_norm, "norm", torch.float64, activation="relu", k=None)
    config = replace(config, l1_coefficient=0.3, aux_coefficient=0.0)
    with torch.no_grad():
        model.W_dec[3, 1] = 0  # a decoder without a norm: its direction has no gradient
    none = torch.zeros(20, dtype=torch.bool)
    result = forward(model, config, x, dead=none, k=None, step=0, select=selection.WarmSelection())
    assert torch.equal(result.n_active, (model.pre_acts(x) > 0).sum(dim=0))
    expected = reference.dense_terms(model, config, x)
    parameters = list(model.parameters())
    for name in ("reconstruction", "sparsity"):
        torch.testing.assert_close(result.terms[name], expected[name], rtol=1e-10, atol=0)
    fast = torch.autograd.grad(sum(result.terms.values(), torch.zeros(())), parameters)
    slow = torch.autograd.grad(sum(expected.values(), torch.zeros(())), parameters)
    for a, b in zip(fast, slow, strict=True):
        assert (a - b.nan_to_num()).norm() <= 1e-6 * b.nan_to_num().norm()


@pytest.mark.parametrize("variant", ["batchtopk", "l1 dense", "l1 sparse"])
def test_fifty_steps_stay_on_the_dense_trajectory(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosscoders.training.objective.SPARSE_DENSITY", {"cpu": float(variant == "l1 sparse")})
    l1 = {"activation": "relu", "k": None} if variant != "batchtopk" else {}
    model, config, _ = setting("sum", "norm", torch.float32, **l1)
    config = replace(config, lr=1e-2, clip_norm=1.0, **({"l1_coefficient": 0.05, "aux_coefficient": 0.0} if l1 else {}))
    other, *_ = setting("sum", "norm", torch.float32, **l1)
    fast, slow = Optimizer(model, config), torch.optim.Adam(other.parameters(), lr=1e-2)
    select, dead = selection.WarmSelection(), torch.arange(20) < (0 if l1 else 4)
    for step in range(50):
        x = random(64, 2, 6, seed=100 + step)
        k = None if l1 else 3
        result = forward(model, config, x, dead=dead, k=k, step=step, select=select)
        torch.stack(list(result.terms.values())).sum().backward()
        fast.step_(1e-2)
        slow.zero_grad()
        torch.stack(list(reference.dense_terms(other, config, x, dead=dead, k=k).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        slow.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("variant", ["batchtopk", "l1 dense", "l1 sparse"])
def test_a_step_leaves_nothing_behind(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collector: a cycle through the graph would keep every batch of a long run."""
    monkeypatch.setattr("crosscoders.training.objective.SPARSE_DENSITY", {"cpu": float(variant == "l1 sparse")})
    is_l1 = variant != "batchtopk"
    model, config, x = setting("sum", "norm", torch.float32, **({"activation": "relu", "k": None} if is_l1 else {}))
    dead = torch.arange(20) < (0 if is_l1 else 4)
    gc.collect()
    gc.disable()
    try:
        n_tensors = []
        for _ in range(3):
            model.zero_grad()
            known = {"dead": dead, "k": None if is_l1 else 3, "select": selection.WarmSelection()}
            torch.stack(list(forward(model, config, x, step=0, **known).terms.values())).sum().backward()
            n_tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
        assert n_tensors[0] == n_tensors[1] == n_tensors[2]
    finally:
        gc.enable()


def test_the_encoder_gradient_needs_no_transposed_copy() -> None:
    model, config, x = setting("sum", "norm", torch.float32)
    terms = forward(
        model, config, x, dead=torch.zeros(20, dtype=torch.bool), k=3, step=0, select=selection.WarmSelection()
    )
    terms.terms["reconstruction"].backward()
    assert model.W_enc.grad is not None and model.W_enc.grad.stride() == model.W_enc.stride()


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6])
def test_the_optimiser_equals_plain_adam_with_clipped_gradients(clip_norm: float | None) -> None:
    model, config, x = setting("sum", "squared", torch.float32)
    other, *_ = setting("sum", "squared", torch.float32)
    config = replace(config, clip_norm=clip_norm)
    plain, ours = torch.optim.Adam(other.parameters(), lr=1e-2), Optimizer(model, config)
    alive = torch.zeros(20, dtype=torch.bool)
    for step in range(5):
        for m in (other, model):
            result = forward(m, config, x, dead=alive, k=3, step=step, select=selection.WarmSelection())
            result.terms["reconstruction"].backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip_norm)
        plain.step()
        plain.zero_grad()
        ours.step_(1e-2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is None and (a - b).norm() <= 1e-5 * b.norm()


def test_the_norm_of_many_gradients_is_exact_to_float32() -> None:
    grads = [random(3000, 2, 256), random(3000, seed=1), random(2, 256, seed=2)]
    expected = float(torch.cat([grad.double().flatten() for grad in grads]).norm())
    assert float(total_norm(grads)) == pytest.approx(expected, rel=1e-6)  # torch's own is 2e-5 off


@pytest.mark.parametrize("n_dead", [0, 8])
def test_bfloat16_products_select_and_the_values_stay_float32(n_dead: int) -> None:
    model, config, x = setting("sum", "norm", torch.float32)
    dead = torch.arange(20) < n_dead
    known = {"dead": dead, "k": 3, "step": 0}
    exact = forward(model, config, x, **known, select=selection.WarmSelection())
    rough = forward(model, config, x, **known, select=selection.WarmSelection(), products=torch.bfloat16)
    assert rough.n_active.sum() == exact.n_active.sum()
    assert (rough.n_active - exact.n_active).abs().sum() <= 4  # of 192: entries within rounding of the cut
    for name in exact.terms:
        torch.testing.assert_close(rough.terms[name], exact.terms[name], rtol=1e-2, atol=0)
    pre = model.pre_acts(x).detach()
    chosen = selection.active(pre.bfloat16().float(), torch.zeros(20))
    refined = sparse.refine(chosen, model.W_enc, model.b_enc, x.flatten(1))
    torch.testing.assert_close(refined.values, pre[chosen.tokens, chosen.latents].relu(), rtol=1e-5, atol=1e-6)
    torch.stack(list(rough.terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_l1_in_bfloat16_is_near_float32(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosscoders.training.objective.SPARSE_DENSITY", {"cpu": density})
    model, config, x = setting("sum", "norm", torch.float32, activation="relu", k=None)
    config, grads = replace(config, l1_coefficient=0.3, aux_coefficient=0.0), []
    for products in (torch.float32, torch.bfloat16):
        model.zero_grad()
        none = torch.zeros(20, dtype=torch.bool)
        result = forward(
            model, config, x, dead=none, k=None, step=0, select=selection.WarmSelection(), products=products
        )
        torch.stack(list(result.terms.values())).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for exact, rough in zip(*grads, strict=True):
        # Rounding is 0.4%; signs of pre-activations near 0 change too, and each takes a whole entry with it.
        assert (exact - rough).norm() < 0.05 * exact.norm()
