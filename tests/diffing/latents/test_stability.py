"""Stability: a run against itself, permuted and unrelated ones; verdicts of matches; wrong runs."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig
from crosscoders.training.feed import cache_inputs
from diffing import cli
from diffing.latents.stability import TrainedRun, matches, read_returns, returns, stability
from diffing.latents.table import scale_run


def run_of(seed: int, n: int = 20, d_model: int = 64) -> TrainedRun:
    generator = torch.Generator().manual_seed(seed)
    made = Crosscoder(CrosscoderConfig(dict_size=n, k=2, d_model=d_model)).requires_grad_(False)
    made.W_dec.copy_(torch.randn(made.W_dec.shape, generator=generator))
    table = pandas.DataFrame(
        {"n_active": [99] * n, "verdict": ["shared"] * (n // 2) + ["rotated"] * (n // 2), "rank": np.arange(1, n + 1)}
    )
    return TrainedRun(made, table)


def values(runs: list[TrainedRun]) -> dict[str, float]:
    return {row["name"].removeprefix("stability."): row["value"] for row in stability(runs)}


def test_a_permuted_copy_survives_whole_and_is_matched_latent_by_latent() -> None:
    run = run_of(0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    crosscoder = run.crosscoder.fold()
    crosscoder.W_dec.copy_(2.5 * run.crosscoder.W_dec[order])  # the length of a decoder does not matter
    copy = TrainedRun(crosscoder, run.table.iloc[order.numpy()].reset_index(drop=True))
    found = matches(run, copy)
    assert (order.numpy()[found.partners] == found.latents).all() and found.cosine.min() > 0.999
    got = values([run, copy])
    assert got["all.survival"] == got["shared.same"] == got["rotated.same"] == 1.0
    assert got["control.survival"] == 0.0


def test_unrelated_runs_and_dead_latents_do_not_survive() -> None:
    first, second = run_of(0), run_of(1)
    assert values([first, second])["all.survival"] == 0.0
    dead = TrainedRun(first.crosscoder, first.table.assign(n_active=[99] * 10 + [0] * 10))
    assert len(matches(dead, first).latents) == 10
    assert set(matches(first, dead).partners) <= set(range(10))


def test_a_changed_verdict_survives_but_is_not_the_same() -> None:
    first = run_of(0)
    second = TrainedRun(first.crosscoder, first.table.assign(verdict=["shared"] * 15 + ["rotated"] * 5))
    rows = {row["name"]: row for row in stability([first, second])}
    assert rows["stability.all.survival"]["value"] == 1.0 and rows["stability.all.same"]["value"] == 0.75
    # From the first run 5 of 10 rotated ones stay so, from the second 5 of 5.
    assert rows["stability.rotated.same"]["value"] == pytest.approx(10 / 15)
    assert rows["stability.rotated.same"]["n"] == 15 and rows["stability.rotated.same_least"]["value"] == 0.5


def test_a_latent_is_counted_in_every_run_in_which_it_comes_back() -> None:
    first, unrelated = run_of(0), run_of(1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    copied = Crosscoder(first.crosscoder.config).requires_grad_(False)
    copied.W_dec.copy_(first.crosscoder.W_dec[order])
    verdicts = ["shared" if j < 15 else "rotated" for j in order.tolist()]  # latents 10 to 14 have another one there
    copy = TrainedRun(copied, first.table.assign(verdict=verdicts))
    table = returns([first, copy, unrelated, copy])
    assert table["came_back"].tolist() == [2] * 20
    assert table["same_verdict"].tolist() == [2] * 10 + [0] * 5 + [2] * 5


def test_the_command_takes_several_folders_and_refuses_wrong_ones(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ActivationCache(cache_folder)
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    for seed, folder in enumerate(folders):
        made = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16))
        made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(seed % 2))
        described = cache_inputs(cache)
        if folder.endswith("c"):
            described["cache"]["hook_point"] = "blocks.0.hook_resid_post"
        made.save(folder, provenance=described)
        if not folder.endswith("c"):
            scale_run(Path(folder), cache, n_examples=1)
    (tmp_path / "c" / "latents.json").write_bytes((tmp_path / "a" / "latents.json").read_bytes())
    (tmp_path / "c" / "latents.parquet").write_bytes((tmp_path / "a" / "latents.parquet").read_bytes())
    assert cli.main(["stability", *folders[:2], "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {"stability.all.survival", "stability.top_32.same", "stability.control.survival"} <= names
    kept = read_returns(Path(folders[0]))
    assert kept is not None and kept.attrs["n_runs"] == 1 and set(kept["came_back"]) <= {0, 1}
    scale_run(Path(folders[0]), cache, n_examples=1, n_tokens=500)
    assert read_returns(Path(folders[0])) is None  # the table is another one now
    for argv, line in [
        (folders[:1], "stability needs two or more different runs"),
        ([folders[0], folders[0]], "stability needs two or more different runs"),
        ([folders[0], folders[2]], "has another hook_point than"),
        ([folders[0], str(tmp_path / "no")], "there is no"),
        ([], "runs must be given"),
    ]:
        assert cli.main(["stability", *argv]) == 2
        assert line in capsys.readouterr().err
