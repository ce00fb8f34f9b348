"""Geometry of directions and representations against hand-made and independent values."""

import numpy as np
import pytest
import torch
from torch import Tensor

from crosscoders import InputError
from diffing.baselines.chance import alignment_rows, matched_directions, permuted_tokens, random_directions
from diffing.baselines.geometry import (
    debiased_cka,
    hsic,
    linear_cka,
    max_cosine,
    minibatch_cka,
    one_to_one,
    principal_angles,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cka", [linear_cka, debiased_cka])
def test_cka_of_equal_inputs_is_one_and_knows_neither_rotation_nor_scale_nor_shift(cka: object) -> None:
    assert callable(cka)
    x, y = gaussian(40, 7), gaussian(40, 5, seed=1) + gaussian(40, 7)[:, :5]
    rotation = torch.linalg.qr(gaussian(7, 7, seed=2)).Q
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(3.5 * x @ rotation + 2.0, y) == pytest.approx(cka(x, y), abs=1e-9)


def test_independent_gaussians_are_alike_by_biased_cka_only() -> None:
    x, y = gaussian(64, 1000), gaussian(64, 1000, seed=1)
    assert linear_cka(x, y) > 0.9
    assert abs(debiased_cka(x, y)) < 0.05


def test_hsic_is_the_u_statistic_over_ordered_quadruples() -> None:
    """k_ij (l_ij + l_qr - 2 l_iq) over all different i, j, q, r: Gretton et al. 2005, by loops."""
    x, y = gaussian(6, 3), gaussian(6, 2, seed=1)
    k, other = (x @ x.T).numpy(), (y @ y.T).numpy()
    terms = [
        k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        for i in range(6) for j in range(6) for q in range(6) for r in range(6)
        if len({i, j, q, r}) == 4
    ]  # fmt: skip
    assert hsic(torch.from_numpy(k), torch.from_numpy(other)) == pytest.approx(np.mean(terms), rel=1e-9)


def test_minibatches_agree_with_all_tokens_at_once() -> None:
    x = gaussian(2048, 6)
    y = x[:, :4] + gaussian(2048, 4, seed=1)
    parts = [(x[i : i + 256], y[i : i + 256]) for i in range(0, 2048, 256)]
    assert minibatch_cka(parts) == pytest.approx(debiased_cka(x, y), abs=0.01)


def test_linear_cka_is_the_same_by_grams_and_by_features() -> None:
    x, y = gaussian(10, 30), gaussian(10, 4, seed=1)
    wide = torch.cat([y, torch.zeros(10, 30, dtype=torch.float64)], dim=1)  # more features than tokens, same Gram
    assert linear_cka(x, wide) == pytest.approx(linear_cka(x, y), abs=1e-12)


def test_max_cosine_and_matching_by_hand() -> None:
    one = torch.tensor([[2.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    other = torch.tensor([[0.6, 0.8, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    assert max_cosine(one, other).tolist() == pytest.approx([1.0, 0.0])
    assert max_cosine(one, other, absolute=True).tolist() == pytest.approx([1.0, 0.8])
    shared = torch.tensor([[1.0, 0.0], [1.0, 0.1]])  # both are nearest to the first, and only one may have it
    matched = one_to_one(shared, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert sorted(matched.tolist()) == pytest.approx([0.1 / 1.01**0.5, 1.0])


def test_principal_angles_of_two_planes_that_share_a_line() -> None:
    angle = np.deg2rad(30)
    one = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    other = torch.tensor([[2.0, 0, 0], [0, np.cos(angle), np.sin(angle)]], dtype=torch.float32)
    assert principal_angles(one, other).tolist() == pytest.approx([0, 30], abs=1e-4)


def test_random_angles_are_those_of_random_subspaces() -> None:
    """Mean 85.4 and least 79.7 degrees for 32 of 3,584 dimensions, by simulation elsewhere."""
    generator = torch.Generator().manual_seed(0)
    angles = principal_angles(*(random_directions(32, 3584, generator) for _ in range(2)))
    assert angles.mean() == pytest.approx(85.4, abs=0.3)
    assert angles.min() == pytest.approx(79.7, abs=1.0)


def test_matched_directions_have_the_covariance_of_the_activations() -> None:
    scales = torch.tensor([5.0, 1.0, 0.2])
    x = gaussian(4000, 3).float() * scales
    drawn = matched_directions(x, 4000, torch.Generator().manual_seed(1))
    assert (drawn[:, 0].abs() > 0.9).float().mean() > 0.6
    uniform = random_directions(4000, 3, torch.Generator().manual_seed(1))
    assert (uniform[:, 0].abs() > 0.9).float().mean() == pytest.approx(0.1, abs=0.03)  # on a sphere: uniform in z


def test_no_token_keeps_its_place_and_permuted_tokens_share_nothing() -> None:
    order = permuted_tokens(500, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(500)) and not (order == torch.arange(500)).any()
    x = gaussian(500, 8)
    assert abs(debiased_cka(x, x[order])) < 0.05


def test_every_alignment_figure_stands_beside_both_nulls() -> None:
    one, x = random_directions(20, 16, torch.Generator().manual_seed(3)), gaussian(100, 16).float()
    names = {entry["name"] for entry in alignment_rows("delta", one, one, x, n_angles=4, seed=0)}
    figures = {name.split(".", 1)[1] for name in names if not name.startswith(("delta.random.", "delta.matched."))}
    assert len(figures) == 11
    assert {f"delta.{null}{figure}" for null in ("", "random.", "matched.") for figure in figures} == names


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (gaussian(3, 2), gaussian(3, 2), "got 3 tokens; it needs at least 4"),
        (gaussian(8, 2), gaussian(9, 2), "the same tokens; got 8 and 9"),
        (gaussian(8, 2), torch.ones(8, 2, dtype=torch.float64), "does not vary"),
    ],
)
def test_too_few_or_other_tokens_and_constants_are_one_line(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        debiased_cka(x, y)
