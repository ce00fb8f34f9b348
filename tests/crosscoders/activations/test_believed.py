"""A manifest or shard with a wrong value is not believed, whether its checksum is wrong, right or not there."""

import functools
import json
import operator
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosscoders import ActivationCache, CorruptData
from crosscoders.common import files

Tensors = dict[str, torch.Tensor]


def copied(cache_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_folder, tmp_path / "cache"))


def test_one_digit_of_a_manifest_is_told_by_its_checksum(cache_folder: Path, tmp_path: Path) -> None:
    path = copied(cache_folder, tmp_path) / "manifest.json"
    text = path.read_text()
    number = re.search(r'"mean_norm": \[\s*(\d)', text)
    assert number is not None
    other = str((int(number[1]) + 1) % 10)
    path.write_text(text[: number.start(1)] + other + text[number.end(1) :])
    with pytest.raises(CorruptData, match=r"manifest.json does not match its content_checksum: at least one value has"):
        ActivationCache(path.parent)


def test_a_manifest_of_an_earlier_version_has_no_checksum_and_is_read(cache_folder: Path, tmp_path: Path) -> None:
    path = copied(cache_folder, tmp_path) / "manifest.json"
    value = json.loads(path.read_text())
    del value["content_checksum"]
    path.write_text(json.dumps(value))
    assert ActivationCache(path.parent).manifest_hash == ActivationCache(cache_folder).manifest_hash


@pytest.mark.parametrize(
    "keys, change, match",
    [
        (["statistics", "mean_norm", 0], lambda was: 0.0, r"statistics.mean_norm.0 = 0.0 \(should be greater than 0"),
        (
            ["statistics", "mean_norm", 1],
            lambda was: float("nan"),
            r"statistics.mean_norm.1 = nan \(should be a finite",
        ),
        (["statistics", "mean_norm", 1], lambda was: 2 * was, "are not those of any activations"),
        (["statistics", "mean", 0, 3], lambda was: 1e6, "are not those of any activations"),
        (["n_models"], lambda was: 3, "n_models, d_model and statistics do not agree"),
        (["statistics", "mean_squared_norm"], lambda was: was[:1], "n_models, d_model and statistics do not agree"),
        (["d_model"], lambda was: "16", r"d_model = '16' \(should be a valid integer\)"),
        (["n_tokens"], lambda was: was + 1, "n_tokens is 601 but its shards have 600"),
        (["shards"], lambda was: was[1:], "n_tokens is 600 but its shards have 472"),
        (["shards"], lambda was: [*was[:2], *was[1:2], *was[3:]], "are not each there once and in order"),
        (["shards"], lambda was: [was[1], was[0], *was[2:]], "are not each there once and in order"),
        (["shards"], lambda was: None, r"shards = None \(should be a valid array\)"),
        (["shards"], lambda was: [], r"shards = \[\] \("),
        (["statistics"], lambda was: None, "statistics = None"),
    ],
)
def test_values_that_do_not_agree_are_refused_without_a_checksum(
    cache_folder: Path, tmp_path: Path, keys: list[Any], change: Callable[[Any], Any], match: str
) -> None:
    path = copied(cache_folder, tmp_path) / "manifest.json"
    value = json.loads(path.read_text())
    del value["content_checksum"]
    *above, key = keys
    holder = functools.reduce(operator.getitem, above, value)
    holder[key] = change(holder[key])
    path.write_text(json.dumps(value))
    with pytest.raises(CorruptData, match=match):
        ActivationCache(path.parent)


def nan_in(x: torch.Tensor) -> torch.Tensor:
    return x.index_fill(0, torch.tensor([5]), float("nan"))


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "roles"},
            "holds the tensors activations, document_ids, groups, ",
        ),
        (lambda t: t | {"more": torch.zeros(2)}, "holds the tensors activations, document_ids, groups, more"),
        (lambda t: t | {"positions": t["positions"][:-1].clone()}, r"positions of shape \(127,\) in torch.int"),
        (lambda t: t | {"groups": t["groups"] + 2}, "has groups from 2 to"),
        (lambda t: t | {"roles": t["roles"] + 6}, "has roles from 6 to"),
        (
            lambda t: t | {"token_ids": t["token_ids"].float()},
            "has token_ids of shape .* in torch.float32, not 128 whole",
        ),
        (lambda t: t | {"activations": nan_in(t["activations"])}, "has activations that are not finite"),
        (lambda t: t | {"activations": t["activations"] * -float("inf")}, "has activations that are not finite"),
        (
            lambda t: t | {"activations": t["activations"].bfloat16()},
            r"in torch.bfloat16, not \(128, 2, 16\) in torch.fl",
        ),
    ],
)
def test_a_shard_of_right_checksum_and_wrong_content_is_refused(
    cache_folder: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], match: str
) -> None:
    folder = copied(cache_folder, tmp_path)
    shard = folder / "shard-00001.safetensors"
    save_file(change(load_file(shard)), shard)
    value = json.loads((folder / "manifest.json").read_text())
    value["shards"][1] |= files.written(shard)._asdict()
    files.write_json(folder / "manifest.json", value)
    cache = ActivationCache(folder)
    with pytest.raises(CorruptData, match=match):
        cache.read(100, 200)
