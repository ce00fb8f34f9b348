"""The faults that are played: of each the commands, and what has to be seen.

Wrong settings, hostile weights and damaged folders are here; `benchmarks.faults.interruptions` has what happens to a
command while it runs. A row passes where its command ended as expected and said the words.
"""

import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.faults.inputs import World, cache_line, fit_eval_line, fit_line, train_line
from benchmarks.faults.play import Seen, play
from diffing.demo import ASSETS

REFUSED = (2, 3, 4)


class Expected(NamedTuple):
    """What one command left behind, and what was expected."""

    seen: Seen
    status: tuple[int, ...]
    words: str
    """A pattern that its output has to hold; empty: none."""
    also: bool = True
    """What else has to be true afterwards."""

    @property
    def is_met(self) -> bool:
        """Whether it ended so, in one line where it is a refusal."""
        one_line = self.seen.is_refusal if self.status == REFUSED else self.seen.status in self.status
        return one_line and bool(re.search(self.words, self.seen.output)) and self.also


def edited(source: Path, folder: Path, file: str, change: Callable[[Any], Any]) -> str:
    """Return a copy of a model's folder, of which one JSON file was changed."""
    target = Path(shutil.copytree(source, folder / f"{source.name}-edited", dirs_exist_ok=True))
    value = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(change(value)))
    return str(target)


def refused(line: list[str], words: str, **also: bool) -> Expected:
    """Play a command that has to be refused."""
    return Expected(play(line), REFUSED, words, **also)


def inputs_of_cache(folder: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Return settings of `crosscoders cache` that are wrong, by row, with the words of their refusal."""
    base, tuned = ASSETS / "base", ASSETS / "tuned"
    (folder / "blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    (folder / "column.jsonl").write_text('{"txt": "Return it."}\n')
    (folder / "broken.jsonl").write_text('{"text": "Return it."}\n{"text": \n')
    narrow = edited(base, folder, "config.json", lambda v: v | {"hidden_size": 64})
    ids = edited(tuned, folder / "ids", "tokenizer.json", _swapped)
    lower = edited(tuned, folder / "lower", "tokenizer.json", lambda v: v | {"normalizer": {"type": "Lowercase"}})
    code = edited(tuned, folder / "code", "config.json", lambda v: v | {
        "model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}})  # fmt: skip
    return {
        "01 d_model differs": ({"base": narrow}, "d_model"),
        "02 a layer that is not there": ({"hook_point": "blocks.99.hook_resid_post"}, "layers 0 to"),
        "03 another vocabulary": ({"tuned": ids}, "has id"),
        "04 another normaliser": ({"tuned": lower}, "split text differently"),
        "09 offline, a model that is not here": ({"base": "nobody/nothing"}, "nobody/nothing"),
        "11 float16": ({"model_dtype": "float16"}, "model_dtype"),
        "16 empty documents": ({"data": folder / "blank.jsonl"}, "no text"),
        "18 a missing column": ({"data": folder / "column.jsonl"}, "no column 'text'"),
        "19 data ends early": ({"n_tokens": 10**8}, "Set --n-tokens|only"),
        "19 broken JSON": ({"data": folder / "broken.jsonl"}, "not JSON"),
        "42 a model of own code": ({"tuned": code}, "own|custom code|trust_remote_code"),
        "15 empty --data": ({"data": ""}, "--data is empty"),
        "15 empty --out": ({"out": ""}, "--out is empty"),
    }


def _swapped(tokenizer: dict[str, Any]) -> dict[str, Any]:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return tokenizer


def settings_of_train(folder: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Return settings of `crosscoders train` that are wrong, by row."""
    for name, text in (("inf", "lr: .inf"), ("tag", "lr: !!python/object/apply:os.getpid []"), ("typo", "lrr: 0.1")):
        (folder / f"{name}.yaml").write_text(text)
    return {
        "41 a YAML tag": ({"config": folder / "tag.yaml"}, "constructor|not YAML"),
        "41 an unknown key": ({"config": folder / "typo.yaml"}, "did you mean 'lr'"),
        "47 k of 0": ({"crosscoder.k": 0}, "k"),
        "47 k above dict_size": ({"crosscoder.k": 65}, "k"),
        "13 an infinite loss": ({"lr": 1e30, "lr_warmup_steps": 1}, "loss term .* is (inf|nan)|not finite"),
        "15 an infinite rate": ({"config": folder / "inf.yaml", "lr": None}, "lr is inf"),
        "15 --out is a URL": ({"out": "s3://bucket/run"}, "is a URL"),
    }


def wrong_settings(world: World, folder: Path) -> dict[str, Expected]:
    """Play all wrong settings of cache and train."""
    played = {}
    for number, (name, (changes, words)) in enumerate(inputs_of_cache(folder).items()):
        line = cache_line(str(folder / f"c{number}"))
        out = {"out": str(folder / f"c{number}")} | changes
        played[name] = refused(line[:2] + cache_line(**out)[2:], words)  # type: ignore[arg-type]
    for number, (name, (changes, words)) in enumerate(settings_of_train(folder).items()):
        settings = {"cache": world.at("cache"), "out": str(folder / f"r{number}")} | changes
        played[name] = refused(train_line(**settings), words)  # type: ignore[arg-type]
    return played


class Payload:
    """What unpickling would run."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def foreign_weights(world: World, folder: Path) -> Iterator[tuple[str, Expected]]:
    """Play weights of others that are damaged or hostile."""
    canary = folder / "canary"

    def evaluated(name: str, data: bytes, words: str, file: str = "ae.pt") -> tuple[str, Expected]:
        own = folder / re.sub(r"\W+", "-", name)
        own.mkdir()
        (own / "config.json").write_text('{"dict_class": "BatchTopKCrossCoder", "k": 8}')
        (own / file).write_bytes(data)
        seen = play(["crosscoders", "eval", str(own), f"--cache={world.at('cache')}"])
        return name, Expected(seen, REFUSED, words, not canary.exists())

    whole = (Path(world.at("foreign")) / "ae.pt").read_bytes()
    torch.save({"encoder.weight": torch.zeros(1).expand(2, 128, 10**7)}, folder / "strides.pt")
    yield evaluated("15 a .pt of strides", (folder / "strides.pt").read_bytes(), "would take 10.2 GB")
    yield evaluated("15 an empty .pt", b"", "is empty")
    yield evaluated("15 a cut .pt", whole[:49000], "archive is not whole")
    yield evaluated("34 a malicious .pt", pickle.dumps(Payload(canary), 2), "refused")
    yield evaluated("33 a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")
    yield evaluated("33 a page in place of weights", b"<!DOCTYPE html>" * 9, "not a safetensors", "model.safetensors")
    header = (1 << 40).to_bytes(8, "little") + b"{}"
    yield evaluated("36 a header of 2^40 bytes", header, "header length is impossible", "model.safetensors")
    model = Path(shutil.copytree(ASSETS / "tuned", folder / "pickled"))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary), 2))
    seen = play(cache_line(str(folder / "c"), tuned=model))
    yield "15 a malicious pytorch_model.bin", Expected(seen, REFUSED, r"pytorch_model\.bin", not canary.exists())
    yield from scope_weights(folder)


def scope_weights(folder: Path) -> Iterator[tuple[str, Expected]]:
    """Play dictionaries in the layout of Gemma Scope, and of SAELens, that are none."""

    def fitted(name: str, path: Path, words: str) -> tuple[str, Expected]:
        line = fit_line(str(path), str(folder / "f"), side=None, hook_point="blocks.2.hook_resid_post",
                        foreign_dictionary="true")  # fmt: skip
        return name, refused(line, words)

    zeros = {"b_enc": np.zeros(64), "b_dec": np.zeros(128), "threshold": np.ones(64)}
    shaped = {"W_enc": np.zeros((64, 128)), "W_dec": np.zeros((64, 128)), **zeros}
    as_float = {name: value.astype(np.float32) for name, value in shaped.items()}
    for name, arrays, words in (
        ("38 a transposed npz", as_float, "transposed"),
        ("35 a pickled npy", as_float | {"W_enc": np.array([{}], dtype=object)}, "holds object"),
        ("37 an npz bomb", as_float | {"W_enc": np.zeros((128, 10**6), np.float32)}, "inflate|declares|shape"),
    ):
        path = folder / name[:2] / "params.npz"
        path.parent.mkdir()
        (np.savez_compressed if "bomb" in name else np.savez)(path, **arrays)
        yield fitted(name, path, words)
    lens = folder / "saelens"
    lens.mkdir()
    (lens / "cfg.json").write_text('{"architecture": "standard", "d_in": "128", "d_sae": [64], "dtype": null}')
    (lens / "sae_weights.safetensors").write_bytes(b"\0" * 100)
    yield fitted("15 a cfg.json of wrong types", lens, r"cfg\.json")


def damaged_folders(world: World, folder: Path) -> Iterator[tuple[str, Expected]]:
    """Play caches, runs and fits that lack something or hold something wrong, as no sweep makes it."""

    def copied(name: str, number: int) -> Path:
        return Path(shutil.copytree(world.at(name), folder / f"{name}-{number}"))

    def evaluated(cache: Path | str, run: Path | str, words: str) -> Expected:
        return refused(["crosscoders", "eval", str(run), f"--cache={cache}"], words)

    cache = copied("cache", 0)
    (cache / "shard-00001.safetensors").unlink()
    yield "31 a shard is missing", evaluated(cache, world.at("run"), "shard-00001.safetensors is missing")
    cache = copied("cache", 1)
    first, second = (cache / f"shard-0000{n}.safetensors" for n in (1, 2))
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    yield "31 shards are swapped", evaluated(cache, world.at("run"), "checksum|bytes but the manifest")
    cache = copied("cache", 2)
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text.replace('"n_models": 2', '"n_models": 2, "n_models": 3'))
    yield "32 a doubled key", evaluated(cache, world.at("run"), "content_checksum")
    cache = copied("cache", 3)
    value = json.loads((cache / "manifest.json").read_text())
    del value["content_checksum"]
    value["shards"][1]["name"] = "../shard-00001.safetensors"
    (cache / "manifest.json").write_text(json.dumps(value))
    yield "39 a path out of the folder", evaluated(cache, world.at("run"), "shards are not each there once")
    run = copied("run", 0)
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"sum"', '"suM"'))
    yield "15 one bit of config.json", evaluated(world.at("cache"), run, "content_checksum")
    fit = copied("fit", 0)
    path = fit / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"LORA"', '"IA3"'))
    yield "15 one value of adapter_config.json", refused(fit_eval_line(str(fit)), "adapter_config.json is not the file")
    other = play(cache_line(str(folder / "other"), hook_point="blocks.1.hook_resid_post"))
    yield (
        "52 a cache of another layer",
        (evaluated(folder / "other", world.at("run"), "blocks.1") if other.status == 0 else Expected(other, (0,), "")),
    )
    yield "15 train --out on its cache", refused(train_line(world.at("cache"), world.at("cache")), "activation cache")
    yield "15 cache --out on a run", refused(cache_line(world.at("run")), "holds a run")
