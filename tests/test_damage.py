"""Every JSON file of ours, damaged in every simple way, is one line on the command line and never a traceback."""

import functools
import itertools
import json
import operator
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair

from crosscoders import cli as crosscoders_cli
from crosscoders import run_cache
from crosscoders.activations.settings import Part
from crosscoders.common import files
from diffing import cli as diffing_cli
from diffing.null.calibration import calibrate
from diffing.null.runs import read_scaled
from sae_lora import cli as sae_lora_cli

Main = Callable[[list[str]], int]
PROGRAMS: dict[str, Main] = {
    "crosscoders": crosscoders_cli.main, "diffing": diffing_cli.main, "sae-lora": sae_lora_cli.main
}  # fmt: skip
TRAIN = (
    "--crosscoder.dict-size 8 --crosscoder.k 2 --n-tokens 640 --lr-warmup-steps 1 --batch-size 64 --checkpoint-every 5 "
    "--threshold-start-step 2 --holdout-tokens 88"
).split()
STEP = 97
"""Of so many ways to damage a key, one is tried; there are six for each key. 1 tries all."""
VALUES: list[Any] = [None, 7, "x", [], {}]
"""What is put in place of each value; what is as it was is left out."""


def commands(folder: Path, pair: Pair) -> dict[str, tuple[str, list[str]]]:
    """Command that reads each file of `finished`."""
    cache, run, fit = (str(folder / name) for name in ("cache", "run", "fit"))
    cached = ["cache", "--base", pair.base, "--tuned", pair.tuned, "--data", pair.data, "--n-tokens", "600"]
    cached += ["--hook-point", "blocks.1.hook_resid_post", "--shard-tokens", "128", "--batch-rows", "4"]
    evaluate = ("crosscoders", ["eval", run, "--cache", cache])
    trained = ["train", "--cache", cache, *TRAIN, "--out"]
    report = ("diffing", ["report", run])
    return {
        "cache/manifest.json": evaluate,
        "cache/manifest.json again": ("crosscoders", [*trained, str(folder / "new")]),
        "begun/progress.json": ("crosscoders", [*cached, "--dtype", "float32", "--out", str(folder / "begun")]),
        "begun/sums-00000.json": ("crosscoders", [*cached, "--dtype", "float32", "--out", str(folder / "begun")]),
        "part/sums-00000.json": ("crosscoders", ["merge", str(folder / "part"), "--out", str(folder / "merged")]),
        "part/part.json": ("crosscoders", ["merge", str(folder / "part"), "--out", str(folder / "merged")]),
        "run/config.json": evaluate,
        "run/config.json again": ("diffing", ["stability", run, str(folder / "other")]),
        "run/run.json": ("crosscoders", [*trained, run]),
        "run/run.json again": ("diffing", ["scale", run]),
        "run/run.json shown": report,
        "run/eval.json": ("crosscoders", [*trained, run]),
        "run/eval.json shown": report,
        "killed/step-00000010/manifest.json": ("crosscoders", [*trained, str(folder / "killed")]),
        "run/latents.json": report,
        "run/latents.json again": ("diffing", ["stability", run, str(folder / "other")]),
        "run/examples.json": report,
        "run/causal.json": report,
        "run/null.json": report,
        "fit/run.json": ("sae-lora", fit_words(folder, pair)),
        "fit/adapter/splice.json": ("sae-lora", ["eval", fit, "--data", pair.data, "--n-tokens", "60"]),
    }


def fit_words(folder: Path, pair: Pair) -> list[str]:
    words = ["fit", "--model", pair.tuned, "--dictionary", str(folder / "layer_1"), "--data", pair.data]
    words += ["--hook-point", "blocks.1.hook_resid_post", "--n-tokens", "60", "--rank", "2", "--batch-rows", "2"]
    return [*words, "--context-length", "20", "--out", str(folder / "fit")]


@pytest.fixture(scope="module")
def finished(pair: Pair, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a half of one, a part of one, runs that are scaled and measured, a killed run, and a fit."""
    folder = tmp_path_factory.mktemp("damage")
    shutil.copytree(cache_folder, folder / "cache")
    shutil.copytree(cache_folder, folder / "begun")
    run_cache(pair.config(folder / "part", n_tokens=120), part=Part(1, 1))
    (folder / "begun" / "manifest.json").unlink()
    whole = json.loads((cache_folder / "manifest.json").read_text())
    sums = json.loads((folder / "part" / "sums-00000.json").read_text())
    files.write_json(folder / "begun" / "progress.json", whole)
    for number, shard in enumerate(whole["shards"][:2]):
        files.write_json(folder / "begun" / f"sums-0000{number}.json", sums | shard)
    run = str(folder / "run")
    for name, seed in (("run", "0"), ("other", "1")):
        argv = ["train", "--cache", str(folder / "cache"), *TRAIN, "--seed", seed, "--out", str(folder / name)]
        assert crosscoders_cli.main(argv) == 0
        assert diffing_cli.main(["scale", str(folder / name)]) == 0
    shutil.copytree(run, folder / "killed")
    for name in ("config.json", "model.safetensors", "eval.json"):
        (folder / "killed" / name).unlink()
    assert diffing_cli.main(["causal", run, "--n-documents", "20", "--n-latents", "2", "--random-draws", "2"]) == 0
    scaled = {kind: {0: read_scaled(folder / "run")} for kind in ("tuned", "placebo")}
    known = {"format_version": 1, "latents": files.hash_file(folder / "run" / "latents.json"), "n_tokens": 600}
    files.write_json(folder / "run" / "null.json", {**known, "seed": 0, "nulls": {}, **calibrate(scaled, [0.1])})
    (folder / "layer_1").mkdir()
    W_dec = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    zeros = {"b_enc": np.zeros(24), "b_dec": np.zeros(16), "threshold": np.full(24, 0.1)}
    arrays = {"W_enc": W_dec.T, "W_dec": W_dec, **zeros}
    np.savez(folder / "layer_1" / "params.npz", **{k: v.astype(np.float32) for k, v in arrays.items()})
    assert sae_lora_cli.main(fit_words(folder, pair)) == 0
    return folder


def whole_damages(data: bytes) -> dict[str, bytes]:
    """Ways to damage a file as a whole, in words, and its bytes then."""
    half, listed = data[: len(data) // 2], b"[" + data + b"]"
    return {"half of it": half, "nothing of it": b"", "a list of it": listed, "no text": b"\xff\xfe\x00"}


def key_damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Ways to damage one key, or the first entry of a list, however deep; in words, and the bytes of the file then."""
    value = json.loads(data)
    value.pop("content_checksum", None)  # as in a file of an earlier version; with it, each of these is told by it
    for *above, key in list(paths(value)):
        holder = functools.reduce(operator.getitem, above, value)
        was = holder[key]
        for other in VALUES:
            if other != was:
                holder[key] = other
                yield f"{[*above, key]} = {other!r}", json.dumps(value).encode()
        del holder[key]
        yield f"no {[*above, key]}", json.dumps(value).encode()
        holder.insert(key, was) if isinstance(holder, list) else holder.__setitem__(key, was)


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of plain data, after the keys above it; of a list only the first entry."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*above, key)
        yield from paths(inner, (*above, key))


@pytest.mark.parametrize("name", list(commands(Path(), Pair(Path()))))
def test_a_damaged_file_is_one_line(
    finished: Path, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = (finished / name.split()[0]).read_bytes()
    bad: list[Any] = []
    tried = whole_damages(data) | dict(itertools.islice(key_damages(data), 0, None, STEP))
    for number, (words, damaged) in enumerate(tried.items()):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        program, argv = commands(folder, pair)[name]
        (folder / name.split()[0]).write_bytes(damaged)
        capsys.readouterr()
        try:
            status = PROGRAMS[program](argv)
        except Exception as error:
            bad.append((words, repr(error)))
            continue
        last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        if status not in (0, 2, 4) or len(last) != (status != 0):
            bad.append((words, status, last))
        shutil.rmtree(folder)
    assert not bad
