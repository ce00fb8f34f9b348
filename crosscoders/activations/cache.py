"""Step 2 of the data flow, second half: paired activations that `activations.caching` has stored, read back."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crosscoders.activations.scored import Moments, Tokens, concatenate, fault_in
from crosscoders.activations.settings import CacheConfig
from crosscoders.activations.shards import Manifest
from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.folders import open_folder
from crosscoders.models.names import identity
from crosscoders.text.settings import DataSource


class ActivationCache:
    """A finished cache. Shards are checked against size and checksum when first read.

    Raises:
        InputError: no cache there, or one that is not finished.
        CorruptData: the manifest or a shard is not what was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = open_folder(path)
        there = self.folder.sizes()
        if "manifest.json" not in there:
            raise InputError(f"{str(path)!r} {_lacking(there, self.folder.subfolders())}")
        self.manifest = self.folder.read_model("manifest.json", Manifest)
        for shard in self.manifest["shards"]:
            self._require_size(shard, there.get(shard["name"]))
        self._held: tuple[int, Tokens] | None = None
        self.starts = np.cumsum([0] + [shard["n_tokens"] for shard in self.manifest["shards"]])

    def _require_size(self, shard: dict[str, Any], n_bytes: int | None) -> None:
        path = f"{self.folder}/{shard['name']}"
        if n_bytes is None:
            raise CorruptData(f"{path} is missing. Restore it, or remove {self.folder} and cache again.")
        if n_bytes != shard["n_bytes"]:
            raise CorruptData(
                f"{path} has {n_bytes} bytes but the manifest says {shard['n_bytes']}. "
                f"Restore it, or remove {self.folder} and cache again."
            )

    @property
    def path(self) -> str | Path:
        """Where the cache lies: a local path, or a URL."""
        return self.folder.path

    def __repr__(self) -> str:
        names = " and ".join(str(self.manifest[key]["name"]) for key in ("base", "tuned"))
        return (
            f"ActivationCache({str(self.path)!r}: {len(self):,} tokens of {names} at {self.manifest['hook_point']}, "
            f"d_model={self.d_model:,}, {self.manifest['dtype']})"
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def config(self) -> CacheConfig:
        """The settings that the cache was made with."""
        settings = self.manifest["config"]
        return CacheConfig(**settings | {"data": [DataSource(**source) for source in settings["data"]]})

    @property
    def d_model(self) -> int:
        return int(self.manifest["d_model"])

    @property
    def n_models(self) -> int:
        return int(self.manifest["n_models"])

    @property
    def mean_norm(self) -> list[float]:
        """Mean of ||x|| over all tokens, per model."""
        return list(self.manifest["statistics"]["mean_norm"])

    @property
    def moments(self) -> Moments:
        """Means over all tokens."""
        statistics = self.manifest["statistics"]
        return Moments(statistics["mean"], statistics["mean_norm"], statistics["mean_squared_norm"])

    @functools.cached_property
    def manifest_hash(self) -> str:
        """Identity of the contents, wherever the cache and its models lie: the manifest without settings and names."""
        models = {key: identity(self.manifest.get(key)) for key in ("base", "tuned")}
        return files.hash_json({key: value for key, value in (self.manifest | models).items() if key != "config"})

    def shard(self, number: int) -> Tokens:
        """Return one whole shard, checked; the last one read is kept in memory."""
        held = self._held
        if held is None or held[0] != number:
            entry = self.manifest["shards"][number]
            expected = files.Written(entry["n_bytes"], entry["checksum"])
            self._held = held = None  # free the old shard before the next one is read
            tensors = self.folder.read_tensors(entry["name"], expected)
            if fault := fault_in(tensors, self.manifest, entry["n_tokens"]):
                raise CorruptData(f"{self.folder}/{entry['name']} {fault}. Remove {self.folder} and cache again.")
            self._held = held = (number, Tokens(**tensors))
        return held[1]  # not what another thread may have put there

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens start to stop."""
        return concatenate(list(self.parts(start, stop)))

    def parts(self, start: int, stop: int) -> Iterator[Tokens]:
        """Yield tokens start to stop, from one shard after the other."""
        if not 0 <= start < stop <= len(self):
            raise InputError(f"tokens {start} to {stop} asked of a cache of {len(self)}.")
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        for number in range(int(first), int(last) + 1):
            origin = int(self.starts[number])
            yield self.shard(number).slice(max(start - origin, 0), stop - origin)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tokens]:
        """Yield tokens in cache order, for evaluation; the last batch may be smaller."""
        stop = len(self) if stop is None else min(stop, len(self))
        for tokens in self.parts(start, stop) if start < stop else ():
            for i in range(0, len(tokens.token_ids), batch_size):
                yield tokens.slice(i, i + batch_size)


def _lacking(there: dict[str, int], inner: list[str]) -> str:
    """Say why a folder without a manifest is no cache, and what to do."""
    if "part.json" in there:
        return "is one part of a cache. Put all parts together with `crosscoders merge`."
    if "progress.json" in there:
        return "is not finished: it has no manifest.json. Run the same `crosscoders cache` command again; it goes on."
    points = [name for name in inner if name.startswith("blocks.")]
    if points:
        return f"holds a folder for each of its hook points. Name one: {points[0]}."
    return "is not an activation cache: it has no manifest.json. Run `crosscoders cache` with that --out."
