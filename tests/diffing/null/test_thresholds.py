"""Null calibration: thresholds and rates by slow loops, intervals by simulation, a planted null and a difference."""

import functools
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from crosscoders import (  # fmt: skip
    Crosscoder,
    CrosscoderConfig,
    TrainConfig,
    load_crosscoder,
    tensor_stream,
    train,
)
from diffing import latent_table, scale_latents
from diffing.latents.verdict import is_alive
from diffing.null import rates
from diffing.null.calibration import calibrate
from diffing.null.runs import Scaled

CONCEPTS = torch.nn.functional.normalize(torch.randn(68, 48, generator=torch.Generator().manual_seed(99)), dim=1)


def table_of(n: int, seed: int = 0) -> pandas.DataFrame:
    """Latents with random numbers, some of them rare, some that lean towards the base."""
    rng = np.random.default_rng(seed)
    return pandas.DataFrame(
        {
            "n_active": rng.choice([0, 10, 30, 500], n),
            "relative_decoder_norm": rng.uniform(0.2, 1, n).round(2),
            "nu_error": rng.normal(0.4, 0.5, n).round(2),
            "nu_reconstruction": rng.normal(0.4, 0.5, n).round(2),
            "decoder_cosine": rng.uniform(-1, 1, n).round(2),
            "verdict": rng.choice(["rotated", "shared"], n),
        }
    )


@pytest.mark.parametrize("score", rates.SCORES)
def test_a_threshold_is_the_loosest_one_that_keeps_the_rate(score: str) -> None:
    for seed in range(20):
        table = table_of(60, seed)
        found = rates.evidence(table, score)
        n = sum(row["n_active"] >= 30 for row in table.to_dict("records"))
        for rate in (0.07, 0.5):
            # By trying every value that a latent has, and "everything": rounding makes many of them equal.
            kept = [t for t in (*found, -math.inf) if sum(v > t for v in found) <= rate * n]
            threshold = rates.threshold_at(found, n, rate)
            assert threshold == min(kept)


@pytest.mark.parametrize("draw", ["exponential", "normal", "uniform"])
def test_a_threshold_for_less_than_one_latent_lets_a_further_null_crosscoder_have_that_many(draw: str) -> None:
    rng = np.random.default_rng(0)
    n, largest, over = 900, 0, {0.0: 0, 0.5 / 900: 0}
    for _ in range(300):
        fixed_on, further = (getattr(rng, draw)(size=n) for _ in range(2))
        largest += (further > fixed_on.max()).sum()
        for rate in over:
            over[rate] += (further > rates.threshold_at(fixed_on, n, rate)).sum()
    mean = {rate: count / 300 for rate, count in over.items()}
    assert largest / 300 > 0.8  # the control: what "beyond every latent of the null" promises
    if draw == "exponential":  # for which the form is exact, up to the error of its scale
        assert abs(mean[0.0] - rates.RARE) < 0.1 and abs(mean[0.5 / n] - 0.5) < 0.2
    else:  # lighter tails: never more than promised
        assert mean[0.0] < rates.RARE + 0.05 and mean[0.5 / n] < 0.55


def test_a_threshold_beyond_the_largest_by_hand_and_where_there_is_little_to_go_by() -> None:
    values = np.array([-math.inf, 0.1, 0.9, 0.5, 0.3, 0.7, -math.inf, 0.2, 0.4, -math.inf])
    # round(sqrt(9)) = 3 largest of 9 alive ones: 0.9, 0.7 and 0.5 exceed 0.4 by 0.3 on average.
    assert rates.threshold_at(values, 9, 0.0) == pytest.approx(0.4 + 0.3 * math.log(30))
    assert rates.threshold_at(values, 9, 0.1) == pytest.approx(max(0.9, 0.4 + 0.3 * math.log(3 / 0.9)))
    assert rates.threshold_at(values, 9, 0.0, best=1.0) == 1.0
    assert rates.threshold_at(np.array([-math.inf, 0.3]), 2, 0.0) == 0.3
    assert rates.threshold_at(np.array([-math.inf, -math.inf]), 2, 0.0) == -math.inf
    outlier = np.array([5.0, *np.linspace(0.1, 0.2, 99)])
    assert rates.threshold_at(outlier, 100, 0.0) == 5.0  # never looser than the null's own most extreme latent
    assert [rates.chance(n, rate) for n, rate in ((9, 0.0), (9, 0.05), (9, 0.4), (0, 0.0))] == [0.1 / 9, 0.05, 0.4, 0.0]


def test_only_alive_latents_that_lean_to_the_tuned_model_are_counted_and_all_alive_ones_are_divided_by() -> None:
    table = table_of(200)
    for score, (_, sign, _) in rates.SCORES.items():
        found = rates.evidence(table, score)
        for row, value in zip(table.to_dict("records"), found, strict=True):
            ratio = max(abs(row["nu_error"]), abs(row["nu_reconstruction"]))
            plain = {
                "larger_ratio": ratio,
                "nu_error": abs(row["nu_error"]),
                "nu_reconstruction": abs(row["nu_reconstruction"]),
                "relative_decoder_norm": row["relative_decoder_norm"],
                "decoder_cosine": row["decoder_cosine"],
                "specificity": (1 - min(1, ratio)) * (1 - row["decoder_cosine"]) / 2,
            }[score]
            counted = row["n_active"] >= 30 and row["relative_decoder_norm"] >= 0.5
            assert value == pytest.approx(sign * plain if counted else -math.inf)
    assert is_alive(table["n_active"]).sum() == (table["n_active"] >= 30).sum()


def test_counts_and_rates_of_a_calibration_are_those_of_loops() -> None:
    tables = {
        kind: {seed: Scaled(table_of(80, start + seed), 40.0) for seed in (3, 4, 5)}
        for kind, start in (("tuned", 0), ("placebo", 100), ("rounded", 200))
    }
    found = calibrate(tables, [0.0, 0.1])
    assert {row["null"] for row in found["thresholds"]} == {"placebo"}  # a rounded copy fixes no threshold
    for row in found["thresholds"]:
        sign, at = rates.SCORES[row["score"]].sign, row["threshold"]
        n_alive = {seed: int((made.table["n_active"] >= 30).sum()) for seed, made in tables["placebo"].items()}
        for kind, seeds in tables.items():
            for entry, (seed, made) in zip(row["counts"][kind], seeds.items(), strict=True):
                values = sign * rates.score_values(made.table, row["score"])
                eligible = (made.table["n_active"] >= 30) & (made.table["relative_decoder_norm"] >= 0.5)
                count = sum(bool(e) and v > sign * at for e, v in zip(eligible, values, strict=True))
                assert entry == {"seed": seed, "count": count, "n": int((made.table["n_active"] >= 30).sum())}
        first, *others = row["counts"]["placebo"]
        assert first["count"] <= row["rate"] * n_alive[3]
        assert row["false_positive_rate"] == sum(e["count"] for e in others) / (n_alive[4] + n_alive[5])
        assert row["low"] <= row["false_positive_rate"] <= row["high"] and row["n_effective"] == 80
        assert len(row["latents"]) == row["counts"]["tuned"][0]["count"]
    alone = {kind: {3: seeds[3]} for kind, seeds in tables.items()}
    row = calibrate(alone, [0.0])["thresholds"][0]
    assert not row["held_out"] and row["false_positive_rate"] == 0
    assert row["expected_false"] == pytest.approx(row["counts"]["tuned"][0]["n"] * rates.RARE / row["n"])
    rotated = next(row for row in found["fixed"] if row["words"] == "verdict rotated")
    for seed, entry in zip((3, 4, 5), rotated["counts"]["tuned"], strict=True):
        table = tables["tuned"][seed].table
        assert entry["count"] == ((table["verdict"] == "rotated") & (table["n_active"] >= 30)).sum()


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X >= k), summed."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize("k, n", [(0, 7), (1, 40), (3, 90), (39, 40), (40, 40)])
def test_the_ends_of_the_interval_make_the_count_one_in_forty(k: int, n: int) -> None:
    low, high = rates.rate_interval(k, n, n)
    assert (low == 0) if k == 0 else binomial_tail(k, n, low) == pytest.approx(0.025)
    assert (high == 1) if k == n else 1 - binomial_tail(k + 1, n, high) == pytest.approx(0.025)


def crosscoder_with(directions: torch.Tensor) -> Crosscoder:
    """A crosscoder whose tuned decoders are these."""
    made = Crosscoder(CrosscoderConfig(dict_size=len(directions), k=1, d_model=directions.shape[1]))
    with torch.no_grad():
        made.W_dec[:, 0] = 1.0
        made.W_dec[:, 1] = directions
    return made


def test_copies_count_as_one_and_dead_latents_as_none() -> None:
    directions = torch.eye(12).repeat_interleave(5, dim=0) * torch.rand(60, 1).add(0.1)
    directions[::2] *= -1  # opposite directions depend on each other as well
    table = pandas.DataFrame({"n_active": [100] * 60})
    assert rates.effective_number(crosscoder_with(directions), table) == pytest.approx(12)
    table.loc[50:, "n_active"] = 3  # two directions are never seen
    assert rates.effective_number(crosscoder_with(directions), table) == pytest.approx(10)
    assert rates.effective_number(crosscoder_with(torch.eye(12)), table[:12]) == pytest.approx(12)


def test_the_interval_covers_the_rate_of_correlated_latents_and_a_naive_one_does_not() -> None:
    # 60 groups of 15 latents: within a group the decoders have a cosine of 0.8 and the scores a correlation of 0.8.
    generator = torch.Generator().manual_seed(0)
    groups, size, true_rate, n = 60, 15, 0.02, 900
    common = torch.randn(groups, 1, 400, generator=generator)
    directions = (0.8**0.5 * common + 0.2**0.5 * torch.randn(groups, size, 400, generator=generator)).flatten(0, 1)
    n_effective = rates.effective_number(crosscoder_with(directions), pandas.DataFrame({"n_active": [99] * n}))
    assert n_effective == pytest.approx(groups)
    shared = torch.randn(1000, groups, 1, generator=generator)
    own = torch.randn(1000, groups, size, generator=generator)
    cut = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - true_rate)))
    counts = ((0.8**0.5 * shared + 0.2**0.5 * own) > cut).sum(dim=(1, 2)).tolist()
    interval = functools.cache(rates.rate_interval)

    def coverage(n_counted_as: float) -> float:
        ends = [interval(count, n, n_counted_as) for count in counts]
        return float(np.mean([low <= true_rate <= high for low, high in ends]))

    assert coverage(n_effective) >= 0.95
    assert coverage(n) < 0.8  # the control: the same counts, latents taken as independent


def scaled(x: torch.Tensor, seed: int, out: Path) -> Scaled:
    """Train a small crosscoder on (tokens, 2, d_model) and scale it."""
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=96, k=4),
        n_tokens=120_000, batch_size=600, lr=8e-3, lr_warmup_steps=5, lr_decay_fraction=0.3, threshold_start_step=20,
        input_norm="sqrt_d", reconstruction="squared", decoder_init_norm=0.3, seed=seed, dead_after_tokens=20_000,
    )  # fmt: skip
    made = train(config, tensor_stream(x, batch_size=600, seed=seed), out)
    table = latent_table(made, scale_latents(made, x.split(500)))
    return Scaled(table, rates.effective_number(made, table))


def planted(n_concepts: int, seed: int) -> torch.Tensor:
    """Sparse concepts along directions that differ a little between the models, and noise in each. With the first 60
    concepts the two models are alike by construction; the others are in the tuned model alone."""
    generator = torch.Generator().manual_seed(seed)
    shape = 6000, n_concepts
    strength = (torch.rand(shape, generator=generator) < 0.05) * (0.5 + torch.rand(shape, generator=generator))
    moved = [CONCEPTS + 0.04 * torch.randn(CONCEPTS.shape, generator=generator) for _ in range(2)]
    moved[0][60:] = 0
    noise = [0.02 * torch.randn(6000, 48, generator=generator) for _ in range(2)]
    return torch.stack([strength @ d[:n_concepts] + e for d, e in zip(moved, noise, strict=True)], dim=1)


def test_a_planted_null_has_the_stated_rate_and_a_planted_difference_stands_out(tmp_path: Path) -> None:
    null = planted(60, 1)
    tables = {
        "tuned": {0: scaled(planted(68, 2), 0, tmp_path / "tuned")},
        "placebo": {seed: scaled(null, seed, tmp_path / f"null-{seed}") for seed in (0, 1)},
    }
    found = {(row["score"], row["rate"]): row for row in calibrate(tables, [0.0, 0.1])["thresholds"]}
    for score in rates.SCORES:
        row = found[score, 0.1]
        # About 70 latents, threshold fixed on as many others: a standard deviation of 0.05 if all were independent.
        assert row["n"] > 60 and abs(row["false_positive_rate"] - 0.1) < 0.1
        assert row["low"] <= 0.1 <= row["high"]
    row = found["larger_ratio", 0.0]
    assert row["counts"]["placebo"][0]["count"] == 0 and row["counts"]["placebo"][1]["count"] <= 2
    # By the directions along which concepts were planted: what stands out is all that the dictionary learned of the
    # tuned model's own concepts, and nothing else.
    decoders = torch.nn.functional.normalize(load_crosscoder(tmp_path / "tuned").W_dec[:, 1], dim=1)
    cosine, concept = (decoders @ CONCEPTS.T).max(dim=1)
    learned = {int(c) for v, c in zip(cosine, concept, strict=True) if v > 0.8 and c >= 60}
    assert len(learned) >= 5
    assert {int(concept[latent]) for latent in row["latents"] if cosine[latent] > 0.8} == learned
    assert len(row["latents"]) <= len(learned) + 2
