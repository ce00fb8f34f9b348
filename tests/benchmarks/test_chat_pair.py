"""The chat-pair benchmark: the search for L0, counts and rates, ratios, row names, options, one run end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import Pair

from benchmarks import __main__ as command
from benchmarks import chat_pair
from benchmarks.chat_pair import published, runs, summary
from benchmarks.planted import interval, over_seeds
from crosscoders import ActivationCache, CacheConfig, CrosscoderConfig, InputError, TrainConfig, cache_activations
from crosscoders.common.checks import to_dict
from crosscoders.common.results import row
from diffing.causal.sets import BASELINES
from diffing.demo.command import train_on
from diffing.latents.table import scale_run
from diffing.null.runs import Scaled


def test_search_reaches_the_l0_of_a_power_law_from_either_side() -> None:
    for start in (0.1, 10.0):
        asked: list[float] = []

        def l0_of(c: float, asked: list[float] = asked) -> float:
            asked.append(c)
            return 20 * c**-1.3

        found = runs.match_l0(23.0, l0_of, start=start)
        assert 20 * found**-1.3 == pytest.approx(23.0, rel=runs.TOLERANCE)
        assert asked[0] == start and found == asked[-1]


def test_search_trains_once_where_the_start_is_right() -> None:
    asked: list[float] = []
    assert runs.match_l0(10.0, lambda c: asked.append(c) or 10.4, start=0.7) == 0.7  # type: ignore[func-returns-value]
    assert asked == [0.7]


def test_search_gives_up_in_words_where_l0_does_not_move() -> None:
    with pytest.raises(InputError, match="no L1 coefficient gives an L0 of 10 in 3 runs"):
        runs.match_l0(10.0, lambda _: 20.0, start=1.0, max_runs=3)


def test_variants_differ_in_gate_and_sparsity_and_nulls_in_the_tuned_model_alone(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[CacheConfig] = []
    trained: list[TrainConfig] = []
    evaluated: list[bool] = []
    opened = ActivationCache(cache_folder)
    monkeypatch.setattr(runs, "cache_activations", lambda config: caches.append(config) or opened)  # type: ignore[func-returns-value]

    def train_on(cache: ActivationCache, heldout: ActivationCache | None, config: TrainConfig, out: Path) -> None:
        trained.append(config)
        evaluated.append(heldout is not None)

    monkeypatch.setattr(runs, "train_on", train_on)
    for name, heldout in (("batchtopk", opened), ("l1-0.5", opened), ("l1-0.5", None)):
        runs.trained(tmp_path, name, 2, opened, heldout)
    for pair in ("tuned", "placebo"):
        runs.pair_cache(tmp_path, pair)
    bounded, l1, null = (to_dict(config) for config in trained)
    shapes = [found.pop("crosscoder") for found in (bounded, l1, null)]
    assert {key for key in bounded if bounded[key] != l1[key]} == {"l1_coefficient", "aux_coefficient"}
    assert {key for key in shapes[0] if shapes[0][key] != shapes[1][key]} == {"activation", "k"}
    assert l1 == null and shapes[1] == shapes[2] and evaluated == [True, True, False]
    assert (l1["l1_coefficient"], l1["seed"], shapes[1]["activation"]) == (0.5, 2, "relu")
    pair_cache, null_cache = map(to_dict, caches)
    assert {key for key in pair_cache if pair_cache[key] != null_cache[key]} == {"tuned", "tokenizer", "out"}
    assert null_cache["tokenizer"] == pair_cache["tuned"]


def table(n: int = 6) -> pandas.DataFrame:
    # latent:                 0     1     2     3     4     5
    columns = {
        "n_active": [100, 100, 100, 100, 100, 5],
        "relative_decoder_norm": [0.95, 0.95, 0.05, 0.5, 0.7, 0.99],
        "norm_class": ["tuned-only", "tuned-only", "base-only", "shared", "other", "tuned-only"],
        "nu_error": [0.1, 0.9, 0.0, 0.8, -0.1, 0.0],
        "nu_reconstruction": [-0.4, 0.1, 0.0, 0.6, 0.2, 0.0],
        "verdict": ["tuned-specific", "shrunk", "base-specific", "shared", "rotated", "undetermined"],
    }
    return pandas.DataFrame(columns).iloc[:n]


def test_counts_leave_out_latents_that_are_not_alive() -> None:
    found = {name: value for name, (value, _) in summary.counts(table()).items()}
    assert found["alive.count"] == 5
    assert (found["tuned-only.count"], found["base-only.count"], found["shared-norm.count"]) == (2, 1, 1)
    assert found["tuned-only-small-ratios.count"] == 1  # latent 0; latent 1 is shrunk, latent 5 rare
    assert found["small-ratios.count"] == 3  # latents 0, 2 and 4
    assert found["rotated.count"] == 1 and found["dead.count"] == 0


def test_false_positives_are_shares_of_the_alive_latents_of_all_nulls() -> None:
    made = [Scaled(table(), 5.0), Scaled(table(4), 4.0)]
    found = {entry["name"]: entry for entry in summary.false_positive_rates({"placebo": made})}
    rotated = found["rotated.false_positive_rate"]
    assert (rotated["value"], rotated["n"]) == (1 / 9, 9)  # 5 and 4 alive, one of them rotated
    assert rotated["low"] < 1 / 9 < rotated["high"]
    fewer = summary.false_positive_rates({"placebo": [each._replace(n_effective=1.5) for each in made]})
    copies = next(entry for entry in fewer if entry["name"] == "rotated.false_positive_rate")
    assert copies["value"] == 1 / 9 and copies["high"] > rotated["high"]  # as many latents, but not independent
    assert "shared.false_positive_rate" not in found and "alive.false_positive_rate" not in found
    other = summary.false_positive_rates({"format_only": [Scaled(table(), 5.0)]})
    assert {entry["name"].rsplit("_rate", 1)[1] for entry in other} == {"_format_only"}


def test_null_rates_count_what_lies_beyond_the_null_of_the_first_seed() -> None:
    """|nu_error| of eligible latents (norm from 0.5, alive): 0.1, 0.9, 0.8, 0.1 (latents 0, 1, 3, 4)."""
    tuned = table().assign(nu_reconstruction=0.0)
    null = tuned.assign(nu_error=[0.5, 0.9, 0.0, 0.55, 0.6, 0.0])
    other = null.assign(nu_error=[0.3, 0.9, 0.0, 0.8, 0.6, 0.0])
    made = {"placebo": [Scaled(null, 5.0), Scaled(other, 5.0)]}
    found = {entry["name"]: entry for entry in summary.null_rates([Scaled(tuned, 5.0)], made)}
    # Two of five exceed the third, 0.6, by 0.075 on average; ln(2 / 0.1) times that lies beyond it: below 0.375.
    assert found["null.placebo.larger_ratio.zero.count"]["value"] == 2
    rate = found["null.placebo.larger_ratio.zero.false_positive_rate"]
    assert (rate["value"], rate["n"]) == (1 / 5, 5)  # the other seed has one below 0.375, of five alive


def test_rates_of_own_runs_are_read_from_null_json(tmp_path: Path) -> None:
    assert summary.calibrated_rates(tmp_path) == []
    of = {"false_positive_rate": 0.25, "low": 0.1, "high": 0.4, "n": 40, "n_effective": 30.0}
    fixed = [
        {"words": "verdict rotated", "counts": {}, "rates": {"placebo": of, "format_only": of | {"n": 41}}},
        {"words": "decoder cosine below 0.2", "counts": {}, "rates": {"placebo": of}},
    ]
    (tmp_path / "null.json").write_text(json.dumps({"fixed": fixed}))
    assert summary.calibrated_rates(tmp_path) == [
        row("rotated.false_positive_rate", 0.25, "fraction", 40, 0.1, 0.4),
        row("rotated.false_positive_rate_format_only", 0.25, "fraction", 41, 0.1, 0.4),
    ]


def test_ratios_are_quantiles_of_a_group_and_undefined_without_one() -> None:
    found = summary.ratios(table())
    assert found["nu_error.tuned-only.q50"] == (0.5, "ratio")  # of 0.1 and 0.9
    assert found["nu_error.shared-norm.q95"] == (0.8, "ratio")
    assert found["nu_error.tuned-only.within_shared"] == (0.0, "fraction")  # the shared one is at 0.8 alone
    assert summary.ratios(table().iloc[2:5])["nu_error.tuned-only.q50"] == (None, "ratio")


def test_share_within_shared_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    shared = pandas.concat([table().iloc[[3]]] * 400, ignore_index=True)
    shared["nu_error"] = generator.normal(1, 0.2, 400)
    few = pandas.concat([table().iloc[[0]]] * 50, ignore_index=True)
    few["nu_error"] = generator.normal(0.6, 0.3, 50)
    ordered = sorted(shared["nu_error"])
    low, high = ordered[math.floor(0.025 * 399)], ordered[math.ceil(0.975 * 399)]
    expected = sum(low <= value <= high for value in few["nu_error"]) / 50
    found = summary.ratios(pandas.concat([shared, few], ignore_index=True))["nu_error.tuned-only.within_shared"][0]
    assert found == pytest.approx(expected, abs=0.021) and 0 < expected < 1


def test_causal_rows_get_the_published_names() -> None:
    start = "causal.base_to_tuned."
    rows = [
        row(f"{start}none.kl", 2.0, "nats/token", 9),
        row(f"{start}none.first_9.kl", 3.0, "nats/token", 9),
        row(f"{start}best_half.norm.first_9.share_closed", 0.5, "fraction", 9),
        row(f"{start}top_32.scaling.share_closed", 0.4, "fraction", 9),
        row(f"{start}top_32.scaling.ce", 0.4, "nats/token", 9),
        row(f"{start}top_32.random.first_9.share_closed", -0.1, "fraction", 9),
    ]
    assert summary.causal(rows) == {
        "kl.none": (2.0, "nats/token"),
        "kl.none.first_9": (3.0, "nats/token"),
        "share_closed.best_half.norm.first_9": (0.5, "fraction of KL"),
        "top_32.scaling": (0.4, "fraction of KL"),
        "top_32.random.first_9": (-0.1, "fraction of KL"),
    }


def test_intervals_are_cut_at_zero_except_for_signed_units() -> None:
    values = [0.01, 0.05]
    assert interval(values, upper=None)[0] == 0
    mean, half = 0.03, 12.7062 * math.sqrt(0.0008) / math.sqrt(2)
    assert interval(values, lower=None, upper=None) == pytest.approx((mean - half, mean + half), rel=1e-5)
    summaries: list[summary.Summary] = [{"x": (value, "ratio")} for value in values]
    assert over_seeds("p", summaries, signed=("ratio",))[0]["low"] < 0 == over_seeds("p", summaries)[0]["low"]


@pytest.fixture(scope="module")
def scaled_runs(pair: Pair, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Tiny runs on the tiny pair: one of L1, two of BatchTopK."""
    made: dict[str, list[Path]] = {}
    for variant in runs.VARIANTS:
        for seed in range(1 if variant == "l1" else 2):
            out = tmp_path_factory.mktemp(variant) / f"seed-{seed}"
            shape = CrosscoderConfig(dict_size=96, k=24)
            gate: dict[str, object] = {"threshold_start_step": 2}
            if variant == "l1":
                shape = CrosscoderConfig(dict_size=96, activation="relu", k=None)
                gate = {"l1_coefficient": 0.01, "l1_warmup_steps": 2}
            gate |= {"lr_warmup_steps": 2}
            config = TrainConfig(crosscoder=shape, n_tokens=1920, batch_size=64, lr=3e-3, seed=seed, **gate)  # type: ignore[arg-type]
            cache = ActivationCache(cache_folder)
            train_on(cache, cache, config, out)
            scale_run(out, cache, n_examples=1)
            made.setdefault(variant, []).append(out)
    return made


def test_own_runs_are_compared_end_to_end(
    scaled_runs: dict[str, list[Path]],
    cache_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "DRAWS", 2)
    named = [f"{variant}={folder}" for variant, folders in scaled_runs.items() for folder in folders]
    argv = ["run", "chat-pair", "--quick", "--out", str(tmp_path), "--runs", *named, "--cache", str(cache_folder)]
    assert command.main([*argv, "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["rows"]}
    for variant, folders in scaled_runs.items():
        start, n = f"chat-pair.{variant}", len(folders)
        for order in ("scaling", *BASELINES):
            entry = found[f"{start}.top_32.{order}"]
            assert entry["n"] == n
            assert entry["low"] is None if n == 1 else entry["low"] <= entry["value"] <= entry["high"]
        kept = [json.loads((folder / "chat-pair-64.json").read_text())["rows"] for folder in folders]
        for name, source in (("kl.none", "none.kl"), ("share_closed.all", "all.share_closed")):
            values = [entry["value"] for rows in kept for entry in rows if entry["name"].endswith(f"tuned.{source}")]
            assert len(values) == n and found[f"{start}.{name}"]["value"] == pytest.approx(sum(values) / n)
    assert found["chat-pair.batchtopk.stability.all.survival"]["n"] > 2
    assert not any(name.startswith("chat-pair.l1.stability") for name in found)
    l0 = [found[f"chat-pair.{variant}.l0"]["value"] for variant in runs.VARIANTS]
    assert found["chat-pair.l0_ratio"]["value"] == pytest.approx(l0[0] / l0[1])
    assert not any("false_positive_rate" in name for name in found)

    assert (tmp_path / "chat-pair-own-quick.json").is_file()
    monkeypatch.setattr(runs, "measure", lambda *_args, **_kwargs: pytest.fail("a finished measurement was repeated"))
    assert command.main(argv) == 0
    text = capsys.readouterr().out
    assert (
        "published: 0.482 (Minder et al. 2025, arXiv 2504.02922" in text and "Left out: l1.false_positive_rate" in text
    )


def test_published_figures_stand_beside_rows_that_exist(
    scaled_runs: dict[str, list[Path]], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "DRAWS", 2)  # as above, so that what was measured there is used again
    opened = ActivationCache(cache_folder)
    names = {
        f"{variant}.{name}"
        for variant, folders in scaled_runs.items()
        for name in chat_pair.summarise(folders[0], opened, 64)
    }
    assert set(published.PUBLISHED) <= names


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["chat-pair", "--cache", "x"], "needs both --runs VARIANT=RUN ... and --cache HELDOUT"),
        (["chat-pair", "--runs", "l1=x"], "needs both --runs VARIANT=RUN ... and --cache HELDOUT"),
        (["chat-pair", "--runs", "jumprelu=.", "--cache", "x"], "'jumprelu=.' is not VARIANT=RUN"),
        (["chat-pair", "--runs", "l1=nowhere", "--cache", "x"], "'l1=nowhere' is not VARIANT=RUN"),
        (["chat-pair", "--peers"], "chat-pair takes no --peers; only throughput does"),
        (["planted", "--cache", "x"], "planted takes no --cache; only chat-pair does"),
    ],
)
def test_wrong_options_are_named(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["run", *argv, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_run_of_another_pair_is_refused(
    scaled_runs: dict[str, list[Path]], pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_activations(pair.config(tmp_path / "other", hook_point="blocks.0.hook_resid_post", n_tokens=128))
    folder = scaled_runs["l1"][0]
    argv = ["run", "chat-pair", "--runs", f"l1={folder}", "--cache", str(tmp_path / "other"), "--out", str(tmp_path)]
    assert command.main(argv) == 2
    assert "another hook_point" in capsys.readouterr().err
