"""Null calibration: rates and thresholds by slow loops, intervals by simulation, a planted null and a planted
difference, the command on tiny models."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import Pair, make_model, make_tokenizer
from test_cli import TRAIN, error_line

from crosscoders import (  # fmt: skip
    Crosscoder,
    CrosscoderConfig,
    InputError,
    TrainConfig,
    cache_activations,
    load_crosscoder,
    tensor_stream,
    train,
)
from crosscoders import cli as crosscoders_cli
from diffing import cli as diffing_cli
from diffing import latent_table, scale_latents
from diffing.latents.nulls import counts_beside, read_nulls
from diffing.latents.verdict import is_alive
from diffing.null import models, rates
from diffing.null.calibration import calibrate
from diffing.null.runs import Scaled
from diffing.null.settings import NullSettings

# ---------------------------------------------------------------------------------------------------------- thresholds


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


# ----------------------------------------------------------------------------------------------------------- intervals


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


# ----------------------------------------------------------------------------------------------------- planted nulls


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


CONCEPTS = torch.nn.functional.normalize(torch.randn(68, 48, generator=torch.Generator().manual_seed(99)), dim=1)
"""60 for both models, 8 for the tuned model alone."""


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


# ------------------------------------------------------------------------------------------------------------- models


def test_rounding_to_8_bits_is_bfloat16() -> None:
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-6, 6, 5000)
    assert torch.equal(models.round_to_bits(weight, 8), weight.bfloat16().float())
    half = weight[1500:3500].half()
    assert models.round_to_bits(half, 8).dtype == torch.float16
    assert torch.equal(models.round_to_bits(half, 11), half)  # float16 has 11


@pytest.fixture(scope="module")
def scaled_run(pair: Pair, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and scaled run on the tiny pair."""
    run = tmp_path_factory.mktemp("null") / "run"
    assert crosscoders_cli.main(["train", "--cache", str(cache_folder), "--out", str(run), *TRAIN]) == 0
    assert diffing_cli.main(["scale", str(run), "--n-tokens", "500"]) == 0
    return run


@pytest.fixture(scope="module")
def placebo(pair: Pair) -> str:
    """A null model: the base, moved less than the tuned one, without a chat template."""
    folder = pair.folder / "placebo"
    make_tokenizer(folder, template=False)
    make_model(folder, seed=2)
    return str(folder)


def null(run: Path, out: Path, *argv: str) -> int:
    return diffing_cli.main(["null", str(run), "--out", str(out), *argv])


def test_the_command_on_tiny_models(
    scaled_run: Path, placebo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--placebo", placebo, "--rounded-bits", "4", "--n-seeds", "2", "--rates", "[0, 0.2]"]
    out = tmp_path / "nulls"
    assert null(scaled_run, out, *argv, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    found = json.loads((scaled_run / "null.json").read_text())
    kinds = [(entry["kind"], entry["seed"]) for entry in found["crosscoders"]]
    assert kinds == [("tuned", 0), ("tuned", 1), ("placebo", 0), ("placebo", 1), ("rounded", 0)]
    assert {row["rate"] for row in found["thresholds"]} == {0.0, 0.2} and found["n_tokens"] == 500
    rows = {row["name"]: row for row in printed["rows"]}
    assert rows["null.placebo.larger_ratio.zero.count"]["unit"] == "latents"
    assert rows["null.placebo.nu_error.percent_20.false_positive_rate"]["n"] == found["thresholds"][2]["n"]
    # The null crosscoder has the run's own settings, and its cache the run's tokens.
    settings = [json.loads((f / "run.json").read_text())["config"] for f in (scaled_run, out / "placebo" / "seed-0")]
    assert settings[0] == settings[1]
    tokens = [json.loads((out / kind / "cache" / "manifest.json").read_text()) for kind in ("placebo", "rounded")]
    assert tokens[0]["token_hash"] == tokens[1]["token_hash"] and tokens[0]["tokenizer_hash"]
    # Again: nothing is made twice, and the result is the same.
    before = (scaled_run / "null.json").read_bytes()
    weights = [file.stat().st_mtime_ns for file in sorted(out.rglob("*.safetensors"))]
    assert null(scaled_run, out, *argv) == 0
    assert "Thresholds that no null decided" in capsys.readouterr().out
    assert (scaled_run / "null.json").read_bytes() == before
    assert [file.stat().st_mtime_ns for file in sorted(out.rglob("*.safetensors"))] == weights
    # Scaling again gives the same table, and the counts of the nulls stand beside its own.
    assert diffing_cli.main(["scale", str(scaled_run), "--n-tokens", "500"]) == 0
    said = capsys.readouterr().err
    assert "no false-positive rate yet" not in said
    # The report: rate and null counts beside each count, until the table is made again.
    assert diffing_cli.main(["report", str(scaled_run)]) == 0
    page = (scaled_run / "report.html").read_text()
    assert "The same counts on null pairs" in page and "Against null pairs" in page
    count = found["thresholds"][0]["counts"]["tuned"][0]["count"]
    assert f"{count} latent" in page.split("Against null pairs")[1][:200]
    assert json.loads((scaled_run / "report.json").read_text())["nulls"]["seed"] == 0
    assert diffing_cli.main(["scale", str(scaled_run), "--n-tokens", "400"]) == 0
    assert f"no false-positive rate yet: diffing null {scaled_run}" in capsys.readouterr().err
    assert diffing_cli.main(["report", str(scaled_run)]) == 0
    assert "No count on this page has a false-positive rate" in (scaled_run / "report.html").read_text()
    assert diffing_cli.main(["scale", str(scaled_run), "--n-tokens", "500"]) == 0


@pytest.fixture(scope="module")
def raw_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"The size of a table is the sum of line {i} and the word." for i in range(200)))
    return str(file)


def test_a_placebo_with_all_weights_learns_its_text_and_is_made_once(pair: Pair, raw_text: str, tmp_path: Path) -> None:
    given = {"train_placebo": raw_text, "placebo_steps": 12, "placebo_rows": 4, "device": "cpu"}
    settings = NullSettings(run="", out="", placebo_lr=1e-2, **given)  # type: ignore[arg-type]
    made = models.train_placebo(pair.base, tmp_path / "model", settings, 64, 0)
    assert mean_loss(pair.base, made, raw_text) < mean_loss(pair.base, None, raw_text) - 0.3
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert models.train_placebo(pair.base, made, settings, 64, 0) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    other = NullSettings(run="", out="", placebo_lr=2e-2, **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"made with placebo_lr = 0\.01, now 0\.02\. Choose another --out"):
        models.train_placebo(pair.base, made, other, 64, 0)


def test_a_placebo_with_lora_is_a_null_of_the_pair(pair: Pair, scaled_run: Path, raw_text: str, tmp_path: Path) -> None:
    argv = ["--train-placebo", raw_text, "--placebo-steps", "6", "--placebo-lr", "3e-2", "--placebo-rows", "1"]
    assert null(scaled_run, tmp_path / "out", *argv, "--placebo-rank", "2", "--n-seeds", "1") == 0
    folder = tmp_path / "out" / "placebo" / "model"
    assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()
    assert mean_loss(pair.base, folder, raw_text) < mean_loss(pair.base, None, raw_text) - 0.05
    manifest = json.loads((tmp_path / "out" / "placebo" / "cache" / "manifest.json").read_text())
    assert manifest["tuned"]["name"] == str(folder)
    found = json.loads((scaled_run / "null.json").read_text())
    assert not found["thresholds"][0]["held_out"]  # one seed: the rate is that of the crosscoder it was fixed on


def mean_loss(base: str, tuned: Path | None, text: str) -> float:
    """Next-token loss of a model on the first 512 tokens of a text."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tuned is not None and (tuned / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(base if adapter or tuned is None else tuned)
    model = peft.PeftModel.from_pretrained(model, str(tuned)) if adapter else model
    ids = models.text_rows(AutoTokenizer.from_pretrained(base), text, 512)[:1]
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "argv, line",
    [
        ([], "no null is named that fixes a threshold. Give placebo, format_only or train_placebo"),
        (["--rounded-bits", "8"], "no null is named that fixes a threshold"),
        (["--placebo", "x", "--rates", "[1.5]"], "rates hold 1.5; give false-positive rates from 0 to below 1"),
        (["--placebo", "x", "--rates", "[]"], "rates are empty; give"),
        (["--placebo", "x", "--rounded-bits", "60"], "rounded_bits is 60; give a number from 2 to 24."),
        (["--placebo", "x", "--n-seeds", "0"], "n_seeds is 0; give a number from 1 to 1000."),
        (["--placebo", "x", "--train-placebo", "y"], "placebo and train_placebo name the same null. Give one"),
        (["--placebo", "x", "--placebo-lr", "1"], "placebo_lr has no effect without text. Give --train-placebo TEXT"),
        (["--train-placebo", "y"], "train_placebo needs placebo_steps. Take the value with which the tuned model"),
        (["--placebo", "./nowhere"], "model folder './nowhere' does not exist."),
    ],
)
def test_wrong_settings_are_one_line(
    argv: list[str], line: str, scaled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert null(scaled_run, tmp_path, *argv) == 2
    assert line in error_line(capsys)
    assert not any(tmp_path.iterdir())


def test_models_that_are_no_null_of_the_pair_are_one_line(
    pair: Pair, scaled_run: Path, placebo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    wide, other, words = (tmp_path / name for name in ("wide", "gpt2", "words"))
    for folder in (wide, other):
        make_tokenizer(folder)
    make_model(wide, seed=3, d_model=32)
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=3, n_head=2)).save_pretrained(other)
    make_tokenizer(words, words=["entirely different words are in this text"] * 4)
    make_model(words, seed=3)
    for model, line in (
        (wide, "has d_model 16 but tuned"),
        (other, "is a gpt2 but the base"),
        (words, "the tokenizers differ"),
        (pair.tuned, "is the tuned model itself. Give a model without the tuned behaviour."),
        (pair.base, "has the same activations as the base"),
    ):
        assert null(scaled_run, tmp_path / "out", "--placebo", str(model)) == 2
        assert line in error_line(capsys)
    text = Path(pair.data).read_text()
    Path(pair.data).write_text(text.replace("must not be", "should never be"))
    status = null(scaled_run, tmp_path / "changed", "--placebo", placebo)
    Path(pair.data).write_text(text)
    assert status == 2 and "the data of cache" in error_line(capsys)
    # A null cache of another hook point, and a run that was never scaled or was scaled on something else.
    cache_activations(pair.config(tmp_path / "out2" / "placebo" / "cache", tuned=placebo, tokenizer=pair.tuned,
                                  hook_point="blocks.0.hook_resid_post"))  # fmt: skip
    assert null(scaled_run, tmp_path / "out2", "--placebo", placebo) == 2
    assert "holds a cache with another hook_point" in error_line(capsys)
    cache_activations(pair.config(tmp_path / "fewer", n_tokens=300))
    assert null(scaled_run, tmp_path / "out3", "--placebo", placebo, "--cache", str(tmp_path / "fewer")) == 2
    assert "was scaled on cache" in error_line(capsys)


def test_a_chat_or_too_little_text_is_no_placebo_text(pair: Pair, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    with pytest.raises(InputError, match="is a chat; a placebo is tuned on raw text only"):
        models.text_rows(tokenizer, pair.data, 16)
    (tmp_path / "short.txt").write_text("Return the name.")
    with pytest.raises(InputError, match=r"less than one row of 1,024\. Give more text"):
        models.text_rows(tokenizer, str(tmp_path / "short.txt"), 1024)


def test_rounding_that_changes_nothing_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has more than 24 significant bits\. Lower --rounded-bits"):
        models.round_model(pair.base, tmp_path / "rounded", 24)
    assert not (tmp_path / "rounded").exists()


def test_a_null_file_that_lacks_a_part_is_named(scaled_run: Path, tmp_path: Path) -> None:
    whole = {"format_version": 1, "crosscoders": [{"kind": "tuned", "seed": 0}], "thresholds": [{"null": "placebo"}]}
    for content, line in (
        ({}, "format_version None"),
        ({"format_version": 1}, "has no 'crosscoders'. Run: diffing"),
        (whole, "an entry of 'thresholds' has no 'score'"),
        (whole | {"crosscoders": [{"kind": "<b>", "seed": 0}]}, "names '<b>'; expected one of tuned, placebo"),
    ):
        (tmp_path / "null.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=line):
            read_nulls(tmp_path)


def test_a_verdict_that_calls_a_latent_specific_has_its_null_counts_beside_it() -> None:
    one = {"seed": 0, "n": 90}
    counts = {"tuned": [{**one, "count": 9}], "placebo": [{**one, "count": 2}, {**one, "seed": 1, "count": 5}]}
    found = {
        "crosscoders": [{"kind": "tuned"}, {"kind": "placebo"}, {"kind": "placebo"}],
        "fixed": [{"words": "verdict rotated", "counts": counts}, {"words": "something else", "counts": counts}],
    }
    assert counts_beside(found) == {"rotated": "placebo 2"}
    assert counts_beside({}) == {}


def test_settings_hold_what_the_command_needs() -> None:
    settings = NullSettings(run="a", out="b", placebo="c")
    assert settings.rates == [0.0, 0.01] and settings.n_seeds == 3
