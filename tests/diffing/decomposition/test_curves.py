"""Every basis is the same change, sets of pieces lead from the base to the tuned model, clusters are what they say."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.decompose.toys import VectorTask
from diffing.decomposition import baselines
from diffing.decomposition.curves import by_site, curve, masks_with, ranked, robust, whole_sites, written
from diffing.decomposition.evaluation import distance_of, reference_of
from diffing.decomposition.similarity import clusters, cosines, similarity, together
from diffing.decomposition.sites import Delta

GENERATOR = torch.Generator().manual_seed(5)
TASK = VectorTask()
X = torch.randn(64, 6, generator=GENERATOR)


def tuned_and_deltas() -> tuple[nn.Module, dict[str, Delta], Tensor]:
    """A linear model; its change has three orthogonal pieces of sizes 3, 2 and 1."""
    model = nn.Sequential(nn.Linear(6, 5))
    q, p = (torch.linalg.qr(torch.randn(n, 3, generator=GENERATOR)).Q for n in (5, 6))
    change = (q * torch.tensor([3.0, 2.0, 1.0])) @ p.T
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(5, 6, generator=GENERATOR) + change)
    return model, {"0": Delta(change)}, change


@pytest.mark.parametrize("kind", ["svd", "rotation", "weighted"])
def test_every_basis_adds_up_to_the_change(kind: str) -> None:
    _, deltas, change = tuned_and_deltas()
    moment = X.T @ X / len(X)
    pieces = {
        "svd": lambda: baselines.svd(deltas),
        "rotation": lambda: baselines.rotation(deltas, 0),
        "weighted": lambda: baselines.weighted_svd(deltas, {"0": moment}),
    }[kind]()
    V, U = pieces["0"]
    assert V.shape[1] == 3
    torch.testing.assert_close((V @ U).T, change, rtol=0, atol=1e-4)


def test_data_weighted_pieces_leave_less_of_the_output_than_singular_ones() -> None:
    _, deltas, change = tuned_and_deltas()
    x = X * torch.tensor([5.0, 1, 0.1, 2, 0.3, 1])
    left = {}
    for kind, pieces in (
        ("svd", baselines.svd(deltas)), ("weighted", baselines.weighted_svd(deltas, {"0": x.T @ x / len(x)})),
    ):  # fmt: skip
        V, U = pieces["0"]
        left[kind] = float((x @ change.T - x @ V[:, :1] @ U[:1]).square().sum())
    assert left["weighted"] < 0.9 * left["svd"]


def test_sets_of_pieces_go_from_the_base_to_the_tuned_model() -> None:
    model, deltas, change = tuned_and_deltas()
    decomposition = baselines.with_pieces(model, deltas, baselines.svd(deltas))
    reference = reference_of(decomposition, TASK, [X])
    assert reference == pytest.approx(float((X @ change.T).square().mean()), rel=1e-4)
    order = ranked(written(decomposition, TASK, [X]))
    points = curve(decomposition, TASK, [X], order, [0, 1, 2, 3], reference)
    sizes = [float((X @ (baselines.svd(deltas)["0"][0][:, i])).square().mean()) * s**2 for i, s in enumerate((3, 2, 1))]
    assert [n for _, n in order] == sorted(range(3), key=lambda i: -sizes[i])
    assert [p.sufficiency for p in points] == pytest.approx(np.cumsum([0, *sorted(sizes)[::-1]]) / sum(sizes), abs=1e-4)
    assert [p.necessity for p in points] == pytest.approx([p.sufficiency for p in points], abs=1e-4)
    assert whole_sites(decomposition, TASK, [X], ["0"], reference) == pytest.approx(1)


def test_masks_keep_or_drop_the_chosen_pieces() -> None:
    model, deltas, _ = tuned_and_deltas()
    decomposition = baselines.with_pieces(model, deltas, baselines.svd(deltas))
    keep = masks_with(decomposition, {"0": [1]}, on=True)["0"]
    drop = masks_with(decomposition, by_site([("0", 0), ("0", 2)]), on=False)["0"]
    assert keep.components.tolist() == [0, 1, 0] and float(keep.remainder) == 0
    assert drop.components.tolist() == [0, 1, 0] and float(drop.remainder) == 1


def test_an_adversary_cannot_touch_a_set_that_is_everything() -> None:
    model, deltas, _ = tuned_and_deltas()
    decomposition = baselines.with_pieces(model, deltas, baselines.svd(deltas))
    reference = reference_of(decomposition, TASK, [X])
    shares = robust(decomposition, TASK, X, {"0": [0, 1, 2]}, reference, steps=5)
    assert shares == pytest.approx([1] * 6, abs=1e-4)
    weak = robust(decomposition, TASK, X, {"0": [2]}, reference, steps=5)
    assert weak[-1] <= weak[0] < 0.9
    off = masks_with(decomposition, {"0": [2]}, on=True)
    longer = robust(decomposition, TASK, X, {"0": [2]}, reference, steps=20)
    assert longer[-1] == pytest.approx(1 - distance_of(decomposition, TASK, [X], off) / reference, abs=1e-3)


def test_raw_lora_directions_are_the_factors_of_the_adapter() -> None:
    import peft

    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=GENERATOR)
    V, U = baselines.lora(model.base_model.model, ["0"])["0"]
    torch.testing.assert_close((V @ U).T, layer.get_delta_weight("default"))


def test_the_cosine_of_pieces_is_that_of_their_matrices() -> None:
    a, b = ((torch.randn(6, n, generator=GENERATOR), torch.randn(n, 5, generator=GENERATOR)) for n in (3, 4))
    left, right = (torch.einsum("ic,co->cio", *pair).flatten(1) for pair in (a, b))
    expected = torch.stack([torch.cosine_similarity(row[None], right) for row in left])
    torch.testing.assert_close(cosines(a, b), expected)


def test_a_decomposition_is_itself_whatever_the_order_and_signs_and_its_null_is_not() -> None:
    V, U = torch.randn(20, 8, generator=GENERATOR), torch.randn(8, 20, generator=GENERATOR)
    order = torch.randperm(8, generator=GENERATOR)
    found = similarity({"0": (V, U)}, {"0": (-V[:, order], -3 * U[order])})
    assert found.cosine == pytest.approx(1) and found.null < 0.6 and found.n_pieces == 8
    assert similarity({"0": (V, U)}, {}).cosine == 0


def test_pieces_that_are_on_together_are_one_cluster() -> None:
    rng = np.random.default_rng(0)
    first, second = ((rng.random(500) < 0.1).astype(float) for _ in range(2))
    g = np.stack([first, second, 0.9 * first, np.ones(500), second * rng.uniform(0.8, 1, 500), np.ones(500)], axis=1)
    numbers = clusters(g)
    assert numbers[0] == numbers[2] and numbers[1] == numbers[4] and numbers[3] == numbers[5]
    assert len(set(numbers.tolist())) == 3


def test_always_on_pieces_are_together_however_their_importances_vary() -> None:
    rng = np.random.default_rng(1)
    g = np.concatenate([rng.uniform(0.8, 1, (400, 3)), (rng.random((400, 1)) < 0.2).astype(float)], axis=1)
    assert len(set(clusters(g)[:3].tolist())) == 1 and clusters(g)[3] != clusters(g)[0]
    expected = np.minimum(g[:, 0], g[:, 3]).sum() / np.maximum(g[:, 0], g[:, 3]).sum()
    np.testing.assert_allclose(together(g)[[0, 3], [3, 0]], expected)
    np.testing.assert_allclose(together(np.zeros((5, 2))), 0)
