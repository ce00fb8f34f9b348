"""The toys are what they are said to be, and the scores know a right decomposition from a wrong one."""

import pytest
import torch

from benchmarks.decompose.runs import PLANTED
from benchmarks.decompose.scores import column_match, matched, outer, overlap, svd_pieces
from benchmarks.decompose.toys import (
    TMS,
    VectorTask,
    always_on,
    no_effect,
    planted_linear,
    sparse_features,
    train_tms,
)
from diffing.decomposition.build import fresh
from diffing.decomposition.evaluation import attacked, explained, reference_of
from diffing.decomposition.sites import Delta, Site


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_pieces_add_up_to_the_change_and_svd_does_not_find_them(seed: int) -> None:
    planted = planted_linear(seed)
    torch.testing.assert_close(planted.pieces.sum(dim=0), planted.deltas["change"].inner)
    match = matched(svd_pieces(planted.deltas["change"].inner), planted.pieces)
    assert sum(match.cosines) / 6 < 0.5
    assert matched(planted.pieces[[3, 1, 5, 0, 2, 4]], planted.pieces).cosines == pytest.approx([1] * 6)


def test_each_planted_piece_reads_its_own_feature_alone() -> None:
    planted = planted_linear(0)
    read = torch.einsum("poi,fi->pfo", planted.pieces, planted.features).norm(dim=-1)
    expected = torch.zeros(6, 12)
    expected[range(6), range(6)] = 2.5
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-4)


def test_the_right_pieces_explain_everything_and_no_adversary_can_use_the_remainder() -> None:
    planted = planted_linear(1)
    decomposition = fresh(planted.model, planted.deltas, PLANTED, is_relative=True)
    V = torch.zeros(16, 12)
    U = torch.zeros(12, 16)
    for i, piece in enumerate(planted.pieces):
        u, s, vh = torch.linalg.svd(piece)
        V[:, i], U[i] = vh[0], u[:, 0] * s[0]
    decomposition.sites["change"].set_pieces(V, U)
    batches = [planted.batch_of(0, 64)(i) for i in range(2)]
    with torch.no_grad():
        decomposition.networks[0].b2.fill_(1)  # every piece is important everywhere
        decomposition.networks[0].w2.zero_()
    measured = explained(decomposition, VectorTask(), batches)
    assert measured.unexplained == pytest.approx(dict.fromkeys(measured.unexplained, 0), abs=1e-6)
    assert measured.l0 == 12 and len(measured.alive()["change"]) == 12
    path = attacked(decomposition, VectorTask(), batches[0], measured.reference, steps=3)
    assert path == pytest.approx([0] * 4, abs=1e-6)


def test_a_change_without_effect_changes_no_output() -> None:
    planted = no_effect(0)
    decomposition = fresh(planted.model, planted.deltas, PLANTED, is_relative=True)
    assert float(planted.deltas["change"].inner.norm()) > 1
    assert reference_of(decomposition, VectorTask(), [planted.batch_of(0, 32)(0)]) < 1e-9


def test_the_always_on_change_has_rank_three() -> None:
    planted = always_on(0)
    values = torch.linalg.svdvals(planted.deltas["change"].inner)
    assert int((values > 1e-4).sum()) == 3
    assert overlap(planted.pieces.sum(dim=0)[None].flatten(0, 1), planted.pieces.sum(dim=0), 3) == pytest.approx(1)


def test_a_column_is_matched_with_alive_pieces_only_and_each_once() -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    site = Site(Delta(weight), 4, torch.Generator().manual_seed(0))
    V, U = torch.zeros(3, 4), torch.zeros(4, 2)
    for column in range(3):
        V[column, column], U[column] = 1, weight[:, column]
    V[0, 3], U[3] = 1e-3, torch.tensor([1.0, 0.0])  # dead, in the direction of column 0
    site.set_pieces(V, U)
    right = column_match(site, [0, 1, 2], weight, [0, 1, 2])
    assert right.cosines == pytest.approx([1] * 3) and right.norm_ratios == pytest.approx([1] * 3)
    assert right.picks == [0, 1, 2]
    missing = column_match(site, [1, 2], weight, [0, 1, 2])
    assert sorted(missing.cosines) == pytest.approx([0, 1, 1])
    assert outer(site).shape == (4, 2, 3)


def test_a_toy_model_learns_the_features_that_are_present() -> None:
    model = TMS(4, 3, has_identity=True, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([True, True, False, False])
    x = sparse_features(500, 4, 0.3, torch.Generator().manual_seed(1)) * present

    def error() -> float:
        with torch.no_grad():
            return float((model(x) - x).square().mean())

    before = error()
    train_tms(model, present, steps=300, seed=0)
    assert error() < 0.02 * before
    assert torch.equal(model.decoder.weight, model.encoder.weight.T)


def test_features_are_as_sparse_as_asked_for() -> None:
    x = sparse_features(4000, 5, 0.1, torch.Generator().manual_seed(0))
    assert float((x > 0).float().mean()) == pytest.approx(0.1, abs=0.01) and float(x.max()) <= 1
