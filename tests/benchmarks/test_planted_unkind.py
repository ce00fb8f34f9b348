"""The unkind planted world: what fires with what, directions, the mean, noise and outliers, and its measures."""

from typing import cast

import numpy as np
import pandas
import pytest
import torch
from torch.nn.functional import cosine_similarity

from benchmarks.planted import kinds, runs
from benchmarks.planted.unkind import KINDS, TUNED_ONLY, UnkindConfig, make_world, sample
from crosscoders import InputError
from crosscoders.dictionary.metrics import Evaluation

CONFIG = UnkindConfig()
WORLD = make_world(CONFIG, seed=3)
ROWS = {kind: np.flatnonzero(WORLD.table["kind"] == kind) for kind in KINDS}
N = 30_000
DRAWN = sample(WORLD, N, seed=4)
FIRES = DRAWN.activations > 0


def test_a_seed_decides_the_world() -> None:
    again = make_world(CONFIG, seed=3)
    assert torch.equal(again.vectors, WORLD.vectors) and again.table.equals(WORLD.table)
    assert not torch.equal(make_world(CONFIG, seed=5).vectors, WORLD.vectors)
    assert torch.equal(sample(WORLD, 700, seed=1).x, sample(WORLD, 700, seed=1).x)


def test_features_fire_as_often_as_the_table_says() -> None:
    expected = torch.tensor(WORLD.table["frequency"].to_numpy())
    stderr = (expected * (1 - expected) / N).sqrt()
    assert ((FIRES.double().mean(dim=0) - expected) / stderr).abs().max() < 4.5  # largest of 400 normal deviates
    assert 10 < FIRES.sum(dim=1).double().mean() < 20


def test_frequencies_fall_as_a_power_of_the_rank() -> None:
    """1 / p grows by the same amount from rank to rank where nothing is tied to another one and no topic cuts it."""
    free = UnkindConfig(n_child=0, n_pair=0, n_tied=0, n_divided=0, topic_lift=1.0)
    frequency = np.sort(make_world(free, seed=0).table["frequency"])[::-1].astype(np.float64)
    steps = np.diff(1 / frequency)
    assert frequency.sum() == pytest.approx(15, rel=1e-4) and np.allclose(steps, steps[0], rtol=2e-2)


def test_what_fires_with_what() -> None:
    parent, other = WORLD.table["parent"].to_numpy(), WORLD.table["other"].to_numpy()
    for i in ROWS["child"]:
        assert WORLD.table["kind"][parent[i]] == "shared" and not (FIRES[:, i] & ~FIRES[:, parent[i]]).any()
        assert float(FIRES[FIRES[:, parent[i]], i].double().mean()) == pytest.approx(0.4, abs=0.1)
    for i in ROWS["tied"]:
        assert torch.equal(FIRES[:, i], FIRES[:, parent[i]])
    for i in ROWS["pair"]:
        assert torch.equal(FIRES[:, i], FIRES[:, other[i]])
    for i in ROWS["divided"]:
        assert not (FIRES[:, i] & FIRES[:, other[i]]).any()
    assert len(set(parent[parent >= 0])) == len(ROWS["child"]) + len(ROWS["tied"])


def test_features_with_a_home_topic_fire_together() -> None:
    """Pairs of free features fire together more or less often than independence says; without topics none does."""

    def largest_deviation(config: UnkindConfig) -> float:
        world = make_world(config, seed=1)
        rows = np.flatnonzero(world.table["kind"] == "shared")[:60]
        fires = (sample(world, N, seed=2).activations[:, rows] > 0).double()
        expected = torch.outer(fires.mean(dim=0), fires.mean(dim=0))
        deviations = (fires.T @ fires / N - expected) / (expected / N).sqrt()
        return float(deviations.fill_diagonal_(0).abs().max())

    assert largest_deviation(CONFIG) > 15 and largest_deviation(UnkindConfig(topic_lift=1.0)) < 7


def test_magnitudes_have_a_pareto_tail_and_median_1() -> None:
    s = DRAWN.activations[FIRES].double()
    assert float(s.median()) == pytest.approx(1, abs=0.01) and float(s.min()) >= 0.5 ** (1 / 3) - 1e-5
    for at in (2, 4, 8):  # P(s > a) = a^-3 / 2
        assert float((s > at).double().mean()) == pytest.approx(at**-3 / 2, rel=0.15)


def test_directions_are_those_of_the_kind() -> None:
    base, tuned = WORLD.vectors.unbind(dim=1)
    for kind in TUNED_ONLY:
        assert base[ROWS[kind]].abs().max() == 0 and tuned[ROWS[kind]].norm(dim=1).allclose(torch.tensor(1.0))
    assert tuned[ROWS["base-only"]].abs().max() == 0
    assert torch.equal(base[ROWS["shared"]], tuned[ROWS["shared"]])
    assert base[ROWS["rescaled"]].norm(dim=1).tolist() == pytest.approx([0.25, 0.3, 0.4, 0.5, 0.6, 0.7] * 4, abs=1e-5)
    first, second = ROWS["divided"][::2], ROWS["divided"][1::2]
    assert torch.equal(base[first], base[second]) and not torch.equal(tuned[first], tuned[second])
    for rows in (first, second):
        cosine = cosine_similarity(base[rows], tuned[rows], dim=1)
        assert cosine.tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6] * 8, abs=1e-5)


def test_the_mean_is_as_long_as_the_signal_and_noise_is_common_and_uneven() -> None:
    clean = torch.einsum("ni,imd->nmd", DRAWN.activations, WORLD.vectors)
    rest = DRAWN.x - clean - WORLD.bias
    assert float(WORLD.bias.norm(dim=1).mean() / clean[:, 1].pow(2).sum(dim=1).mean().sqrt()) == pytest.approx(
        1, abs=0.2
    )
    own = rest[:, 0] - rest[:, 1]
    assert float(own.std()) == pytest.approx(CONFIG.noise * 2**0.5, rel=0.01)
    eigenvalues = torch.linalg.eigvalsh(rest[:, 0].T.cov())
    assert eigenvalues[-1] > 20 * eigenvalues.median()


def test_outliers_are_a_share_of_tokens_of_a_hundred_times_the_length() -> None:
    config = UnkindConfig(outlier_share=0.005)
    drawn, usual = sample(make_world(config, seed=3), N, seed=4), DRAWN
    ratio = drawn.x.flatten(1).norm(dim=1) / usual.x.flatten(1).norm(dim=1)
    assert torch.equal(drawn.activations, usual.activations)
    assert set(ratio.round().tolist()) == {1.0, 100.0} and float((ratio > 2).double().mean()) == pytest.approx(
        0.005, rel=0.3
    )


def test_features_that_come_in_twos_need_an_even_number() -> None:
    with pytest.raises(InputError, match="n_divided is 3; these come in twos"):
        UnkindConfig(n_divided=3)


def test_recall_is_by_kind_and_the_first_latents_are_those_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    features = pandas.DataFrame({"kind": ["shared", "tuned-only", "tuned-only", "child", "divided", "divided"]})
    table = pandas.DataFrame(
        {
            "feature": [1, 1, 3, 4, 0, -1],
            "class": ["tuned-only", "tuned-only", "tuned-only", "divided", "shared", "unmatched"],
            "verdict": ["tuned-specific", "tuned-specific", "tuned-leaning", "split", "split", "shared"],
            "rank": [1, 2, 3, 4, 5, 6],
            "n_active": [500] * 5 + [3],
            "relative_decoder_norm": [0.95, 0.95, 0.8, 0.99, 0.5, 0.5],
            "decoder_cosine": [0.0] * 5 + [1.0],
            "decoder_norm_tuned": [1.0] * 6,
            "decoder_norm_base": [0.1, 0.1, 0.5, 0.0, 1.0, 1.0],
            "partner_correlation": [float("nan")] * 6,
            "sibling_role": [None, None, None, "part", "part", None],
            "sibling_cosine": [float("nan")] * 3 + [0.95, 0.95, float("nan")],
            **{
                f"nu_{target}{suffix}": [0.0] * 6
                for target in ("error", "reconstruction")
                for suffix in ("", "_stderr", "_mirror", "_mirror_stderr")
            },
        }
    )
    monkeypatch.setattr(kinds, "FIRST", 4)
    run = runs.Run(table, WORLD._replace(table=features), cast(Evaluation, None))
    found = {name: value for name, (value, _) in kinds.by_kind(run).items()}
    assert found["verdict.recall_by_kind.tuned-only"] == 1 / 2 and found["verdict.recall_by_kind.child"] == 0
    assert found["verdict_or_leaning.recall_by_kind.child"] == 1 and found["verdict.recall_by_kind.pair"] is None
    assert found["rank.precision_at_4"] == 3 / 4 and found["norm_difference.precision_at_4"] == 3 / 4
    assert found["norm.precision_at_4"] == 3 / 4 and found["split.precision"] == found["split.recall"] == 1 / 2
    assert found["features.missed.tuned-only"] == 1 and found["features.missed.divided"] == 1
