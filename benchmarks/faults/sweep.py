"""Bits flipped in, and ends cut off, every kind of file that commands read: refused in one line, or without effect.

`READERS` names for each file a command that reads it, and what shows its result; a try is harmless where that is the
same as with the whole file.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.inputs import DATA, World, cache_line, fit_eval_line, fit_line, train_line
from benchmarks.faults.play import Seen, play
from crosscoders.common import files
from diffing.demo import ASSETS

Outcome = Callable[[Path, Seen], object]


class Reader(NamedTuple):
    """A kind of file and a command that reads it."""

    needs: tuple[str, ...]
    """What of the world is copied for a try; the file is in the first."""
    file: str
    line: Callable[[Path], list[str]]
    outcome: Outcome


class Tally(NamedTuple):
    """Tries of one kind of file."""

    refused: int
    harmless: int
    believed: list[str]
    """What was done to the file, and what was seen, of the tries that were neither."""


def rows_of(folder: Path, seen: Seen) -> object:
    """Return the rows of `--json`."""
    return json.loads(seen.output[seen.output.index("{\n") :])["rows"]


def bytes_of(*names: str) -> Outcome:
    """Return the checksums of files that a command writes."""
    return lambda folder, seen: [files.written(folder / name) for name in names]


def manifest_of(name: str) -> Outcome:
    """Return what a manifest says, but for where it lies."""

    def read(folder: Path, seen: Seen) -> object:
        value = json.loads((folder / name).read_text())
        return {key: inner for key, inner in value.items() if key not in ("config", "content_checksum")}

    return read


def trained(folder: Path, seen: Seen) -> object:
    """Return the weights of a run, and what they gave on held-out tokens."""
    run = folder / "killed"
    return files.written(run / "model.safetensors"), json.loads((run / "eval.json").read_text())["rows"]


def said(folder: Path, seen: Seen) -> object:
    """Return whether the command found everything done; it then writes nothing."""
    return "is complete already" in seen.output


def _evaluate(folder: Path) -> list[str]:
    return ["crosscoders", "eval", f"{folder}/run", f"--cache={folder}/cache", "--json"]


def _report(folder: Path) -> list[str]:
    return ["diffing", "report", f"{folder}/run"]


def _resume(folder: Path) -> list[str]:
    return train_line(f"{folder}/cache", f"{folder}/killed")


def _merge(folder: Path) -> list[str]:
    return ["crosscoders", "merge", f"{folder}/part", f"--out={folder}/merged"]


def _begun(folder: Path) -> list[str]:
    return cache_line(f"{folder}/begun")


def _again(folder: Path, **changes: object) -> list[str]:
    return cache_line(f"{folder}/cache", **changes)


REPORTED = bytes_of("run/report.json")
CACHED = manifest_of("begun/manifest.json")

READERS = [
    Reader(("cache", "run"), "manifest.json", _evaluate, rows_of),
    Reader(("cache", "run"), "shard-00001.safetensors", _evaluate, rows_of),
    Reader(("run", "cache"), "config.json", _evaluate, rows_of),
    Reader(("run", "cache"), "model.safetensors", _evaluate, rows_of),
    Reader(("begun",), "progress.json", _begun, CACHED),
    Reader(("begun",), "sums-00001.json", _begun, CACHED),
    Reader(("part",), "part.json", _merge, manifest_of("merged/manifest.json")),
    Reader(("part",), "sums-00002.json", _merge, manifest_of("merged/manifest.json")),
    Reader(("killed", "cache"), "step-00000060/state.safetensors", _resume, trained),
    Reader(("killed", "cache"), "step-00000060/manifest.json", _resume, trained),
    Reader(("killed", "cache"), "run.json", _resume, trained),
    *(
        Reader(("run",), name, _report, REPORTED)
        for name in (
            "latents.json", "latents.parquet", "examples.json", "positions.json", "twins.json", "causal.json",
            "eval.json", "train.jsonl", "run.json",
        )
    ),
    *(
        Reader(("fit",), f"adapter/{name}", lambda folder: fit_eval_line(f"{folder}/fit"), rows_of)
        for name in ("splice.json", "adapter_config.json", "adapter_model.safetensors")
    ),
    *(
        Reader(("tuned", "cache"), name, lambda folder: _again(folder, tuned=f"{folder}/tuned"), said)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    ),
    Reader(("data.jsonl.gz", "cache"), "", lambda folder: _again(
        folder, data=json.dumps([f"{folder}/data.jsonl.gz", *DATA[1:]])), said),
    Reader(("text.parquet", "textcache"), "", lambda folder: cache_line(
        f"{folder}/textcache", data=f"{folder}/text.parquet", n_tokens=300), said),
    Reader(("settings.yaml", "run", "cache"), "", lambda folder: [
        "crosscoders", "train", f"--config={folder}/settings.yaml", f"--cache={folder}/cache", f"--out={folder}/run"
    ], said),
    Reader(("foreign", "cache"), "ae.pt", lambda folder: [
        "crosscoders", "eval", f"{folder}/foreign", f"--cache={folder}/cache", "--json"], rows_of),
    Reader(("scope",), "params.npz", lambda folder: fit_line(
        f"{folder}/scope/params.npz", f"{folder}/scope/fit", side=None, hook_point="blocks.2.hook_resid_post",
        foreign_dictionary="true"), bytes_of("scope/fit/adapter/splice.json")),
]  # fmt: skip


def make_foreign(world: World) -> None:
    """Make the files of others, and of users, that are swept beside ours."""
    import numpy as np
    import pandas
    import torch
    import yaml

    generator = torch.Generator().manual_seed(0)
    folder = world.folder
    for name in ("foreign", "scope"):
        (folder / name).mkdir(exist_ok=True)
    weights = {
        "encoder.weight": torch.randn(2, 128, 64, generator=generator), "encoder.bias": torch.zeros(64),
        "decoder.weight": torch.randn(2, 64, 128, generator=generator), "decoder.bias": torch.zeros(2, 128),
        "k": torch.tensor(8), "threshold": torch.tensor(20.0),
    }  # fmt: skip
    torch.save(weights, folder / "foreign" / "ae.pt")
    (folder / "foreign" / "config.json").write_text('{"dict_class": "BatchTopKCrossCoder", "k": 8}')
    W_dec = torch.randn(64, 128, generator=generator).numpy()
    vectors = {"b_enc": np.zeros(64), "b_dec": np.zeros(128), "threshold": np.full(64, 5.0)}
    arrays: dict[str, Any] = {"W_enc": W_dec.T, "W_dec": W_dec, **vectors}
    np.savez(folder / "scope" / "params.npz", **{k: v.astype(np.float32) for k, v in arrays.items()})
    shutil.copytree(ASSETS / "tuned", folder / "tuned", dirs_exist_ok=True)
    shutil.copyfile(DATA[0], folder / "data.jsonl.gz")
    texts = [f"Return the number {n} and the name of the list." for n in range(60)]
    pandas.DataFrame({"text": texts}).to_parquet(folder / "text.parquet")
    play(cache_line(world.at("textcache"), data=world.at("text.parquet"), n_tokens=300))
    nested: dict[str, object] = {}
    for word in train_line("", "")[2:]:
        name, value = word.removeprefix("--").replace("-", "_").split("=", 1)
        inner = nested
        *above, key = name.split(".")
        for part in above:
            inner = inner.setdefault(part, {})  # type: ignore[assignment]
        if value:
            inner[key] = yaml.safe_load(value)
    (folder / "settings.yaml").write_text(yaml.safe_dump(nested))


def damages(data: bytes, generator: random.Random, n_flips: int, n_cuts: int) -> dict[str, bytes]:
    """Return flipped and cut versions of a file, by what was done."""
    result: dict[str, bytes] = {}
    while len(result) < n_flips:
        at, bit = generator.randrange(len(data)), generator.randrange(8)
        result[f"bit {bit} of byte {at}"] = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
    while len(result) < n_flips + n_cuts:
        at = generator.randrange(len(data))
        result[f"cut to {at} bytes"] = data[:at]
    return result


def sweep(world: World, reader: Reader, *, n_flips: int, n_cuts: int, seed: int = 0) -> Tally:
    """Try a reader on damaged copies of its file."""
    path = Path(reader.needs[0]) / reader.file
    generator = random.Random(f"{seed}:{path}")
    whole = _try(world, reader, None)
    expected = whole[1]
    refused, harmless, believed = 0, 0, []
    for words, data in damages((world.folder / path).read_bytes(), generator, n_flips, n_cuts).items():
        seen, outcome = _try(world, reader, data)
        if seen.is_refusal:
            refused += 1
        elif seen.status == 0 and outcome == expected:
            harmless += 1
        else:
            believed.append(f"{path}: {words}: status {seen.status}: {seen.message}")
    return Tally(refused, harmless, believed)


def _try(world: World, reader: Reader, data: bytes | None) -> tuple[Seen, object]:
    """Run a reader on a copy, with other bytes in its file where given; return its result too, where it has one. The
    copy is always in one place, since results name it."""
    folder = world.folder / "try"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for need in reader.needs:
        source = world.folder / need
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / need)
    if data is not None:
        (folder / reader.needs[0] / reader.file).write_bytes(data)
    seen = play(reader.line(folder))
    return seen, None if seen.status else reader.outcome(folder, seen)
