"""Weights rebuilt at a rank and amplified, against matrices put together by hand."""

from typing import Any

import pytest
import torch
from conftest import Pair

from crosscoders import InputError
from crosscoders.models.pair import ModelPair, load_pair
from diffing.baselines.weight_svd import amplified_, energy_shares, random_delta, rebuilt_, weight_delta

POST = "blocks.1.hook_resid_post"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POST, device="cpu", dtype="float32", whole=True)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(2, 14)[None]).logits


def test_rank_zero_full_rank_and_strengths_are_the_models_themselves(whole: ModelPair) -> None:
    base, tuned = whole.models
    delta = weight_delta(base, tuned)
    before = logits(base).clone()
    with rebuilt_(base, delta, 99):
        assert torch.allclose(logits(base), logits(tuned), atol=1e-5)
    with amplified_(base, delta, 1.0):
        assert torch.allclose(logits(base), logits(tuned), atol=1e-5)
    with rebuilt_(base, delta, 0):  # embeddings and norms are the tuned ones
        assert not torch.allclose(logits(base), before, atol=1e-4)
        assert torch.equal(dict(base.named_parameters())[DOWN], delta.base[DOWN])
    assert torch.equal(logits(base), before)


def test_amplified_weights_lie_on_the_line_through_both_models(whole: ModelPair) -> None:
    base, tuned = whole.models
    one, other = (dict(model.named_parameters())[DOWN].clone() for model in (base, tuned))
    with amplified_(base, weight_delta(base, tuned), 3.0):
        assert torch.allclose(dict(base.named_parameters())[DOWN], one + 3 * (other - one), atol=1e-6)


def test_a_matrix_at_rank_n_is_the_nearest_one_of_that_rank(whole: ModelPair) -> None:
    delta = weight_delta(*whole.models)
    difference = (delta.tuned[DOWN] - delta.base[DOWN]).double()
    rebuilt = delta.matrices[DOWN].at_rank(3).double()
    left = torch.linalg.svdvals(difference)[3:]
    assert torch.linalg.matrix_rank(rebuilt.float()) == 3
    assert (difference - rebuilt).norm() == pytest.approx(float(left.norm()), rel=1e-4)
    assert energy_shares(delta, [0, 99]) == pytest.approx([0, 1])
    assert len(delta.matrices) == 21  # seven in each of three layers


def test_the_random_control_has_the_same_size_and_other_directions(whole: ModelPair) -> None:
    delta = weight_delta(*whole.models)
    drawn = random_delta(delta, torch.Generator().manual_seed(0)).matrices[DOWN]
    assert drawn.at_rank(99).norm() == pytest.approx(float(delta.matrices[DOWN].at_rank(99).norm()), rel=1e-4)
    assert abs(float(drawn.u[:, 0] @ delta.matrices[DOWN].u[:, 0])) < 0.9


def test_equal_layers_and_a_negative_rank_are_one_line(whole: ModelPair) -> None:
    base, tuned = whole.models
    with pytest.raises(InputError, match="no matrix of their layers"):
        weight_delta(base, base)
    with pytest.raises(InputError, match="rank is -1"), rebuilt_(base, weight_delta(base, tuned), -1):
        pass
