"""Planted truth: the generator's statistics, matching, measures on paper, and a small run end to end."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from torch.nn.functional import cosine_similarity

from benchmarks import planted
from benchmarks.planted import generator, matching, runs, scores, summary
from benchmarks.planted.generator import PlantedConfig, Sample, make_truth, sample
from crosscoders import Crosscoder, CrosscoderConfig, InputError
from diffing import scale_latents

TRUTH = make_truth(PlantedConfig(), seed=3)
DRAWN = sample(TRUTH, 60_000, seed=4)


# ---------------------------------------------------------------------------------------------------------- generator


def test_a_seed_decides_everything_and_chunks_do_not_change_the_truth() -> None:
    again = make_truth(PlantedConfig(), seed=3)
    assert torch.equal(again.vectors, TRUTH.vectors) and again.table.equals(TRUTH.table)
    assert not torch.equal(make_truth(PlantedConfig(), seed=5).vectors, TRUTH.vectors)
    first, second = sample(TRUTH, 900, seed=1), sample(TRUTH, 900, seed=1)
    assert torch.equal(first.x, second.x) and first.x.shape == (900, 2, 64)
    assert not torch.equal(sample(TRUTH, 900, seed=2).x, first.x)


def test_the_table_says_what_the_vectors_are() -> None:
    config, table, (base, tuned) = TRUTH.config, TRUTH.table, TRUTH.vectors.unbind(dim=1)
    assert table["class"].value_counts().to_dict() == config.counts()
    for name in generator.CLASSES:
        rows = np.flatnonzero(table["class"] == name)
        b, t, cosine = base[rows].norm(dim=1), tuned[rows].norm(dim=1), cosine_similarity(base[rows], tuned[rows])
        torch.testing.assert_close(torch.tensor(table["cosine"][rows].to_numpy()), cosine)
        if name == "base-only":
            assert (b - 1).abs().max() < 1e-5 and t.max() == 0 and np.isinf(table["gain"][rows]).all()
            continue
        assert (t - 1).abs().max() < 1e-5
        gains = itertools.islice(itertools.cycle(config.gains), len(rows))
        expected = {"tuned-only": [0.0] * len(rows), "rescaled": list(gains)}.get(name, [1.0] * len(rows))
        assert np.allclose(table["gain"][rows], expected, atol=1e-5) and np.allclose(b, expected, atol=1e-5)
        if name in ("shared", "rescaled"):
            assert (cosine - 1).abs().max() < 1e-5
        if name in ("rotated", "recomposed"):  # independent directions: spread 1 / sqrt(d_model) around 0
            assert cosine.abs().mean() < 2 / config.d_model**0.5
        if name == "split":
            assert torch.equal(tuned[rows[::2]], tuned[rows[1::2]])
            assert (cosine - 0.5**0.5).abs().mean() < 0.1  # (u + u') / ||u + u'|| against u
            assert cosine_similarity(base[rows[::2]], base[rows[1::2]]).max() < 0.9


def test_recomposed_features_lie_in_the_span_of_two_shared_ones() -> None:
    shared = TRUTH.vectors[: TRUTH.config.n_shared, 0]
    pairs = torch.combinations(torch.arange(len(shared)))
    sums = torch.nn.functional.normalize(shared[pairs[:, 0]] + shared[pairs[:, 1]], dim=1)
    for row in np.flatnonzero(TRUTH.table["class"] == "recomposed"):
        assert (sums @ TRUTH.vectors[row, 0]).max() > 1 - 1e-5


def test_features_fire_as_often_as_the_table_says() -> None:
    fires = (DRAWN.activations > 0).double()
    expected = torch.tensor(TRUTH.table["frequency"].to_numpy())
    stderr = (expected * (1 - expected) / len(fires)).sqrt()
    assert ((fires.mean(dim=0) - expected) / stderr).abs().max() < 4.5  # largest of 200 normal deviates


def test_children_fire_only_under_their_parent_at_the_child_rate() -> None:
    fires, parent = DRAWN.activations > 0, TRUTH.table["parent"].to_numpy()
    children = np.flatnonzero(parent >= 0)
    assert 0.3 < len(children) / (TRUTH.table["class"] != "shared").sum() < 0.7
    assert (TRUTH.table["class"].to_numpy()[parent[children]] == "shared").all()
    for i in children:
        on = fires[fires[:, parent[i]], i].double()
        assert not fires[~fires[:, parent[i]], i].any()
        assert abs(on.mean() - 0.5) < 4.5 * 0.5 / len(on) ** 0.5


def test_frequencies_without_parents_follow_the_zipf_mandelbrot_law() -> None:
    config = PlantedConfig(child_share=0.0)
    frequency = np.sort(make_truth(config, seed=0).table["frequency"])[::-1]
    assert frequency.sum() == pytest.approx(config.l0)
    # 1 / p grows by the same amount from rank to rank, and p of rank 1 to p of rank 200 is 220 to 21
    steps = np.diff(1 / frequency)
    assert np.allclose(steps, steps[0]) and frequency[0] / frequency[-1] == pytest.approx(220 / 21)


def test_magnitudes_are_lognormal_and_independent_of_the_rest() -> None:
    log = DRAWN.activations[DRAWN.activations > 0].log()
    n = len(log)
    assert abs(log.mean()) < 4.5 * 0.5 / n**0.5 and abs(log.std() - 0.5) < 4.5 * 0.5 / (2 * n) ** 0.5


def test_what_is_left_of_x_is_noise_and_a_constant() -> None:
    clean = torch.einsum("ni,imd->nmd", DRAWN.activations, TRUTH.vectors)
    left = (DRAWN.x - clean).double()
    torch.testing.assert_close(left.mean(dim=0), TRUTH.bias.double(), rtol=0, atol=4.5 * 0.03 / 60_000**0.5)
    assert TRUTH.bias.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert left.std(dim=0).mean() == pytest.approx(0.03, rel=0.01)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="n_split is 3; split features come in pairs"):
        PlantedConfig(n_split=3)
    with pytest.raises(InputError, match="n_shared is 1"):
        PlantedConfig(n_shared=1)


# ----------------------------------------------------------------------------------------------------------- matching


def perfect(truth: generator.Truth, order: torch.Tensor) -> Crosscoder:
    """A crosscoder whose latent j is feature order[j]."""
    d_model = truth.config.d_model
    cc = Crosscoder(CrosscoderConfig(dict_size=len(order), activation="relu", d_model=d_model)).requires_grad_(False)
    cc.W_dec.copy_(truth.vectors[order])
    return cc


def test_the_dictionary_of_the_truth_is_matched_feature_by_feature() -> None:
    # Split features come in pairs with one tuned direction: their activations tell them apart.
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    found = matching.match(perfect(TRUTH, order), DRAWN.activations[:, order], DRAWN, TRUTH)
    assert found["feature"].tolist() == order.tolist()
    assert (found["class"].to_numpy() == TRUTH.table["class"].to_numpy()[order]).all()
    assert found["correlation"].min() > 0.999


def test_latents_without_the_activation_or_without_the_direction_match_nothing() -> None:
    order = torch.arange(200)
    # activations of the wrong tokens
    shifted = matching.match(perfect(TRUTH, order), DRAWN.activations.roll(1, dims=0), DRAWN, TRUTH)
    assert (shifted["feature"] == -1).all() and (shifted["class"] == "unmatched").all()
    # directions of other features: a few of 200 lie within a cosine of 0.5 by chance, none of them its own
    other = matching.match(perfect(TRUTH, order.roll(1)), DRAWN.activations, DRAWN, TRUTH)
    assert (other["feature"] >= 0).sum() <= 20


def test_a_latent_on_the_tuned_side_never_matches_a_base_only_feature() -> None:
    cc = perfect(TRUTH, torch.arange(200))
    row = int(np.flatnonzero(TRUTH.table["class"] == "base-only")[0])
    cc.W_dec[row, 1], cc.W_dec[row, 0] = cc.W_dec[row, 0].clone(), 0
    assert matching.match(cc, DRAWN.activations, DRAWN, TRUTH)["feature"][row] != row


def test_a_latent_that_took_over_half_of_a_parent_has_the_ratio_of_what_it_holds() -> None:
    """Latent = child + parent / 2, firing with the child: nu_error is not the child's gain but the held one."""
    truth = make_truth(PlantedConfig(gains=(0.4,), bias_norm=0.0, noise=0.0, child_share=1.0), seed=1)
    row = int(np.flatnonzero(truth.table["class"] == "rescaled")[0])
    parent = int(truth.table["parent"][row])
    mixed = truth.vectors[row] + 0.5 * truth.vectors[parent]
    cc = perfect(truth, torch.arange(200))
    cc.W_dec[row] = mixed
    expected = float(mixed[0] @ mixed[1] / (mixed[1] @ mixed[1]))
    found = matching.held_gain(cc, np.where(np.arange(200) == row, row, -1), truth)
    assert found[row] == pytest.approx(expected, abs=1e-5) and np.isnan(np.delete(found, row)).all()
    assert expected - 0.4 > 0.08
    s = 0.5 + torch.rand(400, 1, generator=torch.Generator().manual_seed(0))
    one = Crosscoder(CrosscoderConfig(dict_size=1, activation="relu", d_model=64)).requires_grad_(False)
    one.W_dec.copy_(mixed[None])
    one.W_enc.copy_((mixed[1] / (mixed[1] @ mixed[1]))[None, :, None] * torch.tensor([0.0, 1.0])[:, None, None])
    one.b_enc.zero_(), one.b_dec.zero_()
    x = s[:, :, None] * mixed
    assert scale_latents(one, x.split(50))["nu_error"][0] == pytest.approx(expected, abs=1e-4)


def test_correlations_equal_those_of_numpy() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 3, generator=g), torch.randn(50, 2, generator=g)
    expected = np.corrcoef(a.T.numpy(), b.T.numpy())[:3, 3:]
    assert np.allclose(matching.correlations(a, b), expected, atol=1e-6)
    assert matching.correlations(a, torch.ones(50, 1)).abs().max() == 0


def test_the_other_side_is_other_latents_on_the_base_side() -> None:
    cc = Crosscoder(CrosscoderConfig(dict_size=4, activation="relu", d_model=3)).requires_grad_(False)
    cc.W_dec.zero_()
    cc.W_dec[0, 1, 0] = cc.W_dec[1, 0, 1] = cc.W_dec[2, 0, 2] = cc.W_dec[3, 0, 0] = cc.W_dec[3, 1, 0] = 1.0
    g = torch.Generator().manual_seed(0)
    f = torch.rand(400, 4, generator=g)
    f[:, 1] = f[:, 0]  # 0 is tuned-only and fires with 1, which is base-only; 3 is shared
    f[:, 3] = f[:, 2]
    found = matching.other_side_correlation(cc, f)
    assert found[0] == pytest.approx(1) and found[3] == pytest.approx(1) and found[1] < 0.2 and found[2] < 0.2
    cc.W_dec[1:3, 1] = cc.W_dec[1:3, 0]
    assert matching.other_side_correlation(cc, f).tolist() == [0, 0, 0, 0]


# ----------------------------------------------------------------------------------------------------------- measures


def test_auroc_and_average_precision_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        value, positive = rng.integers(0, 6, 25).astype(float), rng.random(25) < 0.4
        pairs = [(a > b) + 0.5 * (a == b) for a in value[positive] for b in value[~positive]]
        assert scores.auroc(value, positive) == pytest.approx(np.mean(pairs))
        area, before = 0.0, 0.0
        for bound in sorted(set(value), reverse=True):
            flagged = value >= bound
            recall = (flagged & positive).sum() / positive.sum()
            area += (recall - before) * (flagged & positive).sum() / flagged.sum()
            before = recall
        assert scores.average_precision(value, positive) == pytest.approx(area)
    assert math.isnan(scores.auroc(value, np.ones(25, dtype=bool)))
    assert math.isnan(scores.average_precision(value, np.zeros(25, dtype=bool)))


def latents(**columns: list[object]) -> pandas.DataFrame:
    usual: dict[str, object] = {"n_active": 1000, "gain": 0.0, "child": False, "correlation": 0.9}
    return pandas.DataFrame({**columns, **{k: v for k, v in usual.items() if k not in columns}})


def test_precision_counts_latents_and_recall_counts_features() -> None:
    table = latents(
        **{"class": ["tuned-only", "tuned-only", "tuned-only", "shared", "unmatched", "rescaled", "tuned-only"]},
        feature=[0, 0, 1, 5, -1, 7, 2],
        gain=[0, 0, 0, 1.0, float("nan"), 0.15, 0],
        value=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
    )
    # Flagged: two latents of feature 0, one of feature 1, a shared and an unmatched one; the weak one is left out.
    found = scores.judge(table, scores.Score(lambda t: t["value"].to_numpy(), 0.5), n_features=4)
    assert found["precision"] == pytest.approx(3 / 5) and found["recall"] == pytest.approx(2 / 4)
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.5 / 1.1)
    nothing = scores.judge(table, scores.Score(lambda t: t["value"].to_numpy(), 2.0), n_features=4)
    assert math.isnan(nothing["precision"]) and nothing["recall"] == nothing["f1"] == 0
    composed = summary.composition("s", scores.Score(lambda t: t["value"].to_numpy(), 0.5), table)
    assert composed["s.flagged.weak"] == (1.0, "latents") and composed["s.precision_with_weak"][0] == 3 / 6


def test_gain_errors_are_of_the_best_latent_of_each_feature() -> None:
    table = latents(
        **{"class": ["rescaled"] * 4 + ["shared"]},
        feature=[3, 3, 4, 5, 6],
        gain=[0.4, 0.4, 0.2, 0.1, 1.0],
        correlation=[0.7, 0.9, 0.9, 0.9, 0.9],
        child=[False, False, True, False, False],
        gain_by_error=[0.9, 0.43, 0.21, 0.6, 0.0],
        gain_by_norm=[0.9, 0.3, 0.0, 0.1, 0.0],
        gain_by_activation_no_bias=[0.9, 0.4, 0.2, 0.1, 0.0],
        held_gain=[0.9, 0.45, 0.29, 0.1, 0.0],
    )
    found = {name: value for name, (value, _) in summary.gain_errors(table).items()}
    assert found["gain_error"] == pytest.approx(0.02)  # of 0.03 and 0.01; the weak one counts only by its gain
    assert found["gain_error.orphan"] == pytest.approx(0.03) and found["gain_error.child"] == pytest.approx(0.01)
    assert found["gain_error.held"] == pytest.approx(0.05)  # of 0.02 and 0.08
    assert found["gain_error.0.1"] == pytest.approx(0.5) and found["norm_gain_error"] == pytest.approx(0.15)


def test_intervals_are_those_of_a_mean_of_few_seeds() -> None:
    # 1, 2, 3, 4, 5: mean 3, stderr sqrt(2.5 / 5), t of 4 degrees of freedom 2.776
    assert planted.interval([1.0, 2, 3, 4, 5], upper=None) == pytest.approx((3 - 1.963, 3 + 1.963), abs=1e-3)
    assert planted.interval([0.9, 1.0, 1.0], upper=1.0)[1] == 1.0 and planted.interval([0.5], upper=1.0) == (None, None)
    rows = planted.over_seeds("p", [{"a": (0.5, "fraction"), "b": (None, "gain")}, {"a": (0.7, "fraction")}])
    assert [(row["name"], row["n"]) for row in rows] == [("p.a", 2)] and rows[0]["value"] == pytest.approx(0.6)


def test_no_reported_seed_was_used_to_choose_a_bound() -> None:
    from benchmarks.planted import calibration

    assert not set(calibration.SEEDS) & set(planted.SEEDS) and len(planted.SEEDS) >= 5


# --------------------------------------------------------------------------------------------------------- end to end


def test_the_scores_find_the_truth_in_a_dictionary_of_the_truth() -> None:
    """With decoders and activations as planted the verdicts are right; with classes dealt at random they are not."""
    truth = make_truth(PlantedConfig(gains=(0.3, 0.5), child_share=0.0, bias_norm=0.0, noise=0.0), seed=1)
    drawn = sample(truth, 20_000, seed=2)
    # 200 features cannot be read off 64 dimensions exactly, so the activations are appended for the encoder alone.
    x = torch.cat([drawn.x, drawn.activations[:, None].repeat(1, 2, 1)], dim=2)
    cc = Crosscoder(CrosscoderConfig(dict_size=200, activation="relu", d_model=264)).requires_grad_(False)
    for weight in (cc.W_enc, cc.W_dec, cc.b_enc, cc.b_dec):
        weight.zero_()
    cc.W_enc[:, 64:] = torch.eye(200) / 2
    cc.W_dec[:, :, :64] = truth.vectors
    truth = truth._replace(vectors=cc.W_dec.clone())
    table = runs.table_of(cc, runs.Data(truth, x, Sample(x, drawn.activations)))
    assert table["feature"].tolist() == list(range(200))
    looked_at = table[table["partner_correlation"].notna() & (table["relative_decoder_norm"] >= 0.5)]
    assert len(looked_at) >= 20
    assert np.allclose(looked_at["partner_correlation"], looked_at["other_side_correlation"], atol=1e-4)
    rescaled = table[table["class"] == "rescaled"]
    assert np.allclose(rescaled["gain_by_error"], rescaled["gain"], atol=1e-4)
    assert np.allclose(rescaled["gain_by_norm"], rescaled["gain"], atol=1e-4)
    for name in ("norm", "published_verdict", "verdict_by_ratios", "verdict"):
        found = scores.judge(table, scores.SCORES[name], truth.config.n_tuned_only)
        assert found["recall"] >= 0.9 and found["precision"] == 1, name
    dealt = table.assign(**{"class": table["class"].sample(frac=1, random_state=0).to_numpy()})
    assert scores.judge(dealt, scores.SCORES["verdict"], 20)["precision"] < 0.4


def test_a_small_run_gives_every_row_that_is_promised_and_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = PlantedConfig(
        d_model=32, n_shared=16, n_tuned_only=6, n_base_only=4, n_rotated=2, n_rescaled=8, n_split=2, n_recomposed=2,
        l0=3.0,
    )  # fmt: skip
    monkeypatch.setattr(planted, "SIZES", {"standard": runs.Size(small, dict_size=64, k=4)})
    monkeypatch.setattr(planted, "VARIANTS", ("l1", "batchtopk-concat"))
    monkeypatch.setattr(planted, "QUICK_STEPS", 120)
    monkeypatch.setattr(runs, "TRAIN_TOKENS", 20_000)
    monkeypatch.setattr(runs, "EVAL_TOKENS", 8_000)
    rows = {row["name"]: row for row in planted.run(True, tmp_path)["rows"]}
    for variant in ("l1", "batchtopk-concat"):
        for score in scores.SCORES:
            for measure in ("recall", "f1", "auroc", "ap"):
                assert 0 <= rows[f"planted.{variant}.{score}.{measure}"]["value"] <= 1
        for name in ("gain_error", "norm_gain_error", "gain_error.0.3", "verdict.recall.shared", "fve.base"):
            assert rows[f"planted.{variant}.{name}"]["n"] == 1
    assert rows["planted.batchtopk-concat.fve.tuned"]["value"] > 0.8
    assert rows["planted.batchtopk-concat.norm.auroc"]["value"] > 0.8
    monkeypatch.setattr(planted, "run_one", lambda *_args, **_settings: pytest.fail("trained again"))
    assert planted.run(True, tmp_path)["rows"] == list(rows.values())


def test_a_size_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="planted has no size 'unkin'; did you mean 'unkind'"):
        planted.run(True, tmp_path, only=("unkin",))
