"""The page of a latent: its histogram, its examples, why it has its verdict, and the sets of `causal` it is in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from causal_pairs import tokenizer_of
from conftest import Pair
from explorer_runs import explorer_run

from crosscoders import ActivationCache, InputError
from crosscoders.common.files import hash_file
from crosscoders.formats.load import load_crosscoder
from diffing import Session
from diffing.causal.sets import choose_sets
from diffing.explorer.pages import latent_page, read_evidence
from diffing.latents.decoder_norms import decoder_difference


@pytest.fixture
def run(cache_folder: Path, tmp_path: Path) -> Path:
    return explorer_run(tmp_path / "run", cache_folder)


def page(pair: Pair, run: Path, cache_folder: Path, latent: int) -> dict[str, Any]:
    cache = ActivationCache(cache_folder)
    return latent_page(read_evidence(run), load_crosscoder(run), cache, tokenizer_of(pair), latent)


def test_the_histogram_counts_every_activation_of_the_cache(pair: Pair, run: Path, cache_folder: Path) -> None:
    cache, crosscoder = ActivationCache(cache_folder), load_crosscoder(run)
    f = crosscoder.encode(cache.read(0, len(cache)).activations.float())[:, 4].numpy()
    shown = page(pair, run, cache_folder, 4)["histogram"]
    assert (shown["n_active"], shown["n_tokens"]) == (np.count_nonzero(f), 600)
    width = f.max() / 40
    assert shown["counts"][:39] == [int(((f > i * width) & (f <= (i + 1) * width)).sum()) for i in range(39)]


def test_a_latent_without_examples_in_the_run_gets_them(pair: Pair, run: Path, cache_folder: Path) -> None:
    listed = json.loads((run / "examples.json").read_text())["latents"]
    missing = next(j for j in range(24) if str(j) not in listed)
    peaks = [example["value"] for example in page(pair, run, cache_folder, missing)["examples"]]
    crosscoder, cache = load_crosscoder(run), ActivationCache(cache_folder)
    f = crosscoder.encode(cache.read(0, len(cache)).activations.float())[:, missing]
    assert peaks[0] == pytest.approx(float(f.max()), abs=1e-4)


def test_the_verdict_comes_with_the_numbers_that_decide_it(pair: Pair, run: Path, cache_folder: Path) -> None:
    columns = json.loads((run / "latents.json").read_text())["columns"]
    base_leaning = next(j for j, norm in enumerate(columns["relative_decoder_norm"]) if norm < 0.5)
    shown = page(pair, run, cache_folder, base_leaning)
    why = {entry["name"]: entry for entry in shown["why"]}
    assert why["nu_error_mirror"]["value"] == columns["nu_error_mirror"][base_leaning]
    assert why["nu_error_mirror"]["stderr"] == columns["nu_error_mirror_stderr"][base_leaning]
    assert why["nu_error_mirror"]["bounds"] == {"nu_error": 0.2}
    assert shown["verdict"]["word"] == columns["verdict"][base_leaning]


def causal_rows(latents: Path, members: list[int]) -> dict[str, Any]:
    rows = [
        {"name": f"causal.{direction}.{name}.{what}", "value": value, "unit": unit, "n": 70, "low": 0.1, "high": 0.6}
        for direction in ("base_to_tuned", "tuned_to_base")
        for name in ("none", "all", "top_5.scaling", "top_5.norm", "top_5.random", "chosen")
        for what, value, unit in (("kl", 0.5, "nats/token"), ("share_closed", 0.4, "fraction"))
    ]
    return {"name": "causal", "config": {"latents": members}, "rows": rows, "latents": hash_file(latents)}


def test_a_page_names_the_sets_of_causal_that_hold_the_latent(pair: Pair, run: Path, cache_folder: Path) -> None:
    (run / "causal.json").write_text(json.dumps(causal_rows(run / "latents.json", [3, 7])))
    evidence, difference = read_evidence(run), decoder_difference(load_crosscoder(run)).numpy()
    for latent in range(24):
        expected = {
            (direction, patched.name)
            for direction, target in (("base_to_tuned", 1), ("tuned_to_base", 0))
            for patched in choose_sets(
                evidence.table, target, difference, n_latents=[5], draws=1, seed=0, latents=[3, 7]
            )
            if patched.name in ("top_5.scaling", "top_5.norm", "chosen") and latent in patched.latents
        }
        sets = page(pair, run, cache_folder, latent)["sets"]
        assert {(entry["direction"], entry["set"]) for entry in sets} == expected
        assert all((entry["value"], entry["low"], entry["high"]) == (0.4, 0.1, 0.6) for entry in sets)


def test_names_of_another_table_are_left_out(pair: Pair, run: Path, cache_folder: Path) -> None:
    entry = {"predictors": [], "name": "loops", "scores": {}, "control": {}}
    described = {"name": "interpret", "config": {}, "rows": [], "format_version": 1, "fault": None}
    described |= {"latents": {"4": entry}, "table": hash_file(run / "latents.json")}
    (run / "interpretation.json").write_text(json.dumps(described))
    assert page(pair, run, cache_folder, 4)["name"] == "loops"
    (run / "interpretation.json").write_text(json.dumps(described | {"table": "another"}))
    assert page(pair, run, cache_folder, 4)["name"] is None


def test_a_session_adds_the_lens_of_both_decoders_and_refuses_other_numbers(run: Path, cache_folder: Path) -> None:
    session = Session(run, cache_folder)
    shown = session.latent(4)
    assert sorted(shown["lens"]) == ["base", "tuned"] and len(shown["lens"]["tuned"]) == 10
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    with pytest.raises(InputError, match="there is no latent 24"):
        session.latent(24)
