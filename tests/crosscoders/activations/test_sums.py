"""Sums of shards beside them: what they cost, that they come back bit for bit, and what a resume makes of them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import file_bytes
from conftest import Pair

from crosscoders import CorruptData, run_cache
from crosscoders.activations.plan import make_plan
from crosscoders.activations.scored import Tokens
from crosscoders.activations.shards import ShardWriter
from crosscoders.activations.sums import packed, read_sums, unpacked, write_sums
from crosscoders.common import files
from crosscoders.common.folders import Folder

SHAPE = (2, 2304)


class Counting(Folder):
    """A folder that takes shards without writing them, and counts the bytes of JSON."""

    n_json_bytes = 0

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> files.Written:
        return files.Written(10**12, "0" * 32)

    def write_json(self, name: str, value: object) -> None:
        super().write_json(name, value)
        self.n_json_bytes += (Path(self.path) / name).stat().st_size


def test_bookkeeping_of_ten_million_tokens_takes_less_than_10_mb(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    config = pair.config(tmp_path / "cache")
    plan = make_plan(config)
    plan.shared["d_model"] = SHAPE[1]
    folder = Counting(tmp_path / "counted")
    writer = ShardWriter(config, folder, plan, None)
    writer.numbers = range(-(-10_000_000 // 65_536))
    activations = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    column = torch.zeros(8, dtype=torch.int32)
    for number in writer.numbers:
        writer.write(number, Tokens(activations * (1 + number / 7), *[column] * (len(Tokens._fields) - 1)))
    writer.finish()
    assert len(writer.shards) == 153 and 153 * 8 * 2 * 2304 < folder.n_json_bytes < 10e6
    assert sorted(folder.sizes()) == ["manifest.json"]


def test_sums_come_back_bit_for_bit() -> None:
    array = np.random.default_rng(0).normal(size=SHAPE) * 10.0 ** np.arange(-150, 150)[:256].repeat(9)
    assert (unpacked(packed(array), 2).view(np.int64) == array.view(np.int64)).all()


def test_sums_of_another_shard_or_width_are_refused(tmp_path: Path) -> None:
    pairs = {name: [1.0, 2.0] for name in ("norm_sum", "square_sum", "norm_max")}
    shard = {"name": "shard-00003.safetensors", "n_tokens": 5, "n_bytes": 9, "checksum": "0", **pairs}
    write_sums(Folder(tmp_path), shard | {"sum": np.ones((2, 4))})
    assert read_sums(Folder(tmp_path), "shard-00003.safetensors", (2, 4))["sum"].tolist() == [[1.0] * 4] * 2
    with pytest.raises(CorruptData, match=r"sums-00003.json has the sums .* in shape \(2, 4\), not .* \(2, 5\)"):
        read_sums(Folder(tmp_path), "shard-00003.safetensors", (2, 5))
    (tmp_path / "sums-00003.json").rename(tmp_path / "sums-00001.json")
    with pytest.raises(CorruptData, match=r"sums of shard-00003.* not of shard-00001"):
        read_sums(Folder(tmp_path), "shard-00001.safetensors", (2, 4))


@pytest.mark.parametrize("lost", ["sums-00001.json", "shard-00001.safetensors"])
def test_a_run_whose_sums_or_shard_were_lost_makes_that_shard_again(
    pair: Pair, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    real, out = ShardWriter.finish, tmp_path / "cache"
    monkeypatch.setattr(ShardWriter, "finish", lambda self: None)
    run_cache(pair.config(out))
    monkeypatch.setattr(ShardWriter, "finish", real)
    (out / lost).unlink()
    run_cache(pair.config(out))
    expected, found = file_bytes(cache_folder), file_bytes(out)
    assert expected.keys() == found.keys()
    assert {n: b for n, b in found.items() if "shard" in n} == {n: b for n, b in expected.items() if "shard" in n}
    assert json.loads(found["manifest.json"])["statistics"] == json.loads(expected["manifest.json"])["statistics"]


def test_sums_without_their_plan_are_not_gone_on_from(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    out.mkdir()
    (out / "sums-00000.json").write_text("{}")
    run_cache(pair.config(out))
    assert not list(out.glob("sums*"))
