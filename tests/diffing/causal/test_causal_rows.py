"""Rows and words of `diffing causal`, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from causal_pairs import uneven_crosscoder
from conftest import Pair

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, InputError
from crosscoders.training.feed import cache_inputs
from diffing import cli
from diffing.causal.patching import DIRECTIONS, Measured
from diffing.causal.summary import causal_rows, causal_summary
from diffing.latents.table import latent_table, scale_cache, write_table

SETS = (
    "none all error bias template reconstruction cross_reconstruction chosen source_model best_half.norm "
    "worst_half.scaling top_2.scaling top_4.norm top_4.random top_4.difference top_2.cosine"
).split()


@pytest.fixture(scope="module")
def crosscoder(cache_folder: Path) -> Crosscoder:
    return uneven_crosscoder(cache_folder)


def made_up(n_documents: int = 40) -> Measured:
    """Documents of 10 tokens; KL 2 with none, 1 with top_4.scaling, .9 with top_4.difference, 1.8 or 2 with the two
    random draws."""
    generator = np.random.default_rng(0)
    level = generator.uniform(0.5, 1.5, n_documents) * 10
    kls = {"none": 2, "scaling": 1, "norm": 1.5, "difference": 0.9, "cosine": 1.2, "source_model": 3.0}
    names = [name if name in ("none", "source_model") else f"top_4.{name}" for name in kls] + ["top_4.random"] * 2
    kl = np.stack([factor * level for factor in (*kls.values(), 1.8, 2.0)])
    tokens = np.full((2, n_documents), 10)
    return Measured(names, np.stack([kl, kl]), np.stack([kl, kl]), np.stack([level, level]), tokens)


def test_rows_are_ratios_of_sums_with_paired_intervals() -> None:
    measured = made_up()
    found = {row["name"]: row for row in causal_rows({"base_to_tuned": measured}, first_tokens=5)}
    start = "causal.base_to_tuned"
    assert found[f"{start}.documents"]["value"] == 40
    none, top = found[f"{start}.none.kl"], found[f"{start}.top_4.scaling.share_closed"]
    assert none["value"] == pytest.approx(measured.kl[0, 0].sum() / 400) and none["n"] == 400
    # A share is exact in every resample here, since both sums move together: the pairing shows.
    assert [top[key] for key in ("value", "low", "high")] == pytest.approx([0.5, 0.5, 0.5])
    assert found[f"{start}.none.kl"]["low"] < none["value"] < found[f"{start}.none.kl"]["high"]
    random = found[f"{start}.top_4.random.share_closed"]
    assert [random[key] for key in ("value", "low", "high")] == pytest.approx([0.05, 0.0, 0.1])  # over draws too
    assert found[f"{start}.top_4.random_largest.share_closed"]["value"] == pytest.approx(0.1)
    assert found[f"{start}.top_4.scaling_minus_norm.share_closed"]["value"] == pytest.approx(0.25)
    assert found[f"{start}.top_4.scaling_minus_difference.share_closed"]["value"] == pytest.approx(-0.05)
    assert found[f"{start}.top_4.scaling_minus_cosine.share_closed"]["value"] == pytest.approx(0.1)
    assert found[f"{start}.top_4.scaling_minus_random.first_5.share_closed"]["value"] == pytest.approx(0.45)
    assert f"{start}.none.share_closed" not in found
    text = causal_summary(list(found.values()), 5)
    assert "400 response tokens of 40 chats" in text and "50.0%" in text and "tuned to base" not in text


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    generator, inside = np.random.default_rng(1), 0
    for trial in range(60):
        measured = made_up(30)
        measured.kl[:, 0] = generator.exponential(20.0, 30)  # true mean 2 per token
        row = next(r for r in causal_rows({"base_to_tuned": measured}, seed=trial) if r["name"].endswith("none.kl"))
        inside += row["low"] <= 2.0 <= row["high"]
    assert inside >= 48  # 95% nominal; a percentile bootstrap of 30 skewed values covers about 91%


def test_one_document_has_no_interval_and_equal_models_nothing_to_close() -> None:
    one = made_up(1)
    assert all(row["low"] is None for row in causal_rows({"base_to_tuned": one}))
    one.kl[:] = 0
    with pytest.raises(InputError, match="no KL to close"):
        causal_rows({"base_to_tuned": one})


@pytest.fixture(scope="module")
def run(crosscoder: Crosscoder, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a latent table; do not write to it."""
    folder, cache = tmp_path_factory.mktemp("causal") / "run", ActivationCache(cache_folder)
    crosscoder.save(folder, provenance=cache_inputs(cache))
    scales, contexts, _ = scale_cache(crosscoder, cache)
    table = latent_table(crosscoder, scales, contexts)
    table.to_parquet(folder / "latents.parquet")
    write_table(folder, table, scales, cache)
    return folder


def test_the_command_writes_rows_that_stay_and_a_table(
    run: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["causal", str(run), "--cache", str(cache_folder), "--n-documents", "20", "--n-latents", "[2,4]"]
    argv += ["--random-draws", "3", "--latents", "[1,2]", "--match-frequency", "true"]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "causal.json").read_text())
    assert kept.pop("content_checksum") and kept == found
    names = {row["name"] for row in found["rows"]}
    for direction in DIRECTIONS:
        for name in SETS:
            assert {f"causal.{direction}.{name}{window}.kl" for window in ("", ".first_9")} <= names
        assert f"causal.{direction}.top_4.scaling.share_closed" in names and f"causal.{direction}.unpatched.ce" in names
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "tuned to base: " in shown and "Fewer than 60 chats: the intervals are too narrow." in shown


def test_few_chats_are_said_below_60_only() -> None:
    for n, few in ((59, True), (60, False)):
        text = causal_summary(causal_rows({"base_to_tuned": made_up(n)}), 9)
        assert ("Fewer than 60 chats: the intervals are too narrow." in text) is few


def few_chats(folder: Path) -> str:
    """Return the path of a file of three chats."""
    chat = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A path."}]}
    (folder / "few.jsonl").write_text(3 * (json.dumps(chat) + "\n"))
    return str(folder / "few.jsonl")


def test_wrong_runs_caches_and_lists_are_one_line(
    run: Path, pair: Pair, cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders import cache_activations

    other = tmp_path / "other"
    cache_activations(pair.config(other, hook_point="blocks.0.hook_resid_post", n_tokens=200))
    bare, wide, torn = tmp_path / "bare", tmp_path / "wide", tmp_path / "torn"
    for folder, d_model in ((bare, 16), (wide, 8), (torn, 16)):
        Crosscoder(CrosscoderConfig(dict_size=24, k=4, d_model=d_model)).save(folder)
        if folder != bare:
            for name in ("latents.json", "latents.parquet"):
                (folder / name).write_bytes((run / name).read_bytes())
    (torn / "latents.parquet").write_bytes(b"torn")
    cached = ["--cache", str(cache_folder)]
    for argv, status, line in [
        ([str(tmp_path / "no"), *cached], 2, "is not a folder"),
        ([str(bare), *cached], 2, "has no latent table (latents.json). Make it first: diffing scale"),
        ([str(torn), *cached], 4, "latents.parquet cannot be read"),
        ([str(wide), *cached], 2, "has d_model = 16 but the crosscoder reads 8"),
        ([str(run), "--cache", str(other)], 2, "has another hook_point ('blocks.0.hook_resid_post')"),
        (
            [str(run), *cached, "--n-latents", "2", "--latents", "[99]"],
            2,
            "there is no latent 99: this crosscoder has latents 0 to 23",
        ),
        ([str(run), *cached, "--n-latents", "2", "--latents", "[]"], 2, "latents is an empty list"),
        ([str(run), *cached, "--n-latents", "9999"], 2, "n_latents is 9999; give a number from 1 to"),
        ([str(run), *cached, "--n-documents", "19"], 2, "n_documents is 19; give a number from 20."),
        (
            [str(run), *cached, "--n-latents", "2", "--data", few_chats(tmp_path)],
            2,
            "few.jsonl has 3 chats with a response; intervals over fewer than 20 say nothing. Name more chats with",
        ),
        ([str(run), *cached, "--n-latents", "2", "--data", str(tmp_path / "no.jsonl")], 2, "no.jsonl' does not exist"),
    ]:
        assert cli.main(["causal", *argv]) == status
        text = capsys.readouterr().err
        assert line in text.splitlines()[-1] and "Traceback" not in text
