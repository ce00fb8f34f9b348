"""Step 2 of the data flow, second half: paired activations on disk, written and read.

`cache_activations` writes what an `ActivationSource` yields as shards of [tokens, n_models, d_model], manifest last;
`ActivationCache` reads them back. The same plan gives the same bytes whether or not the run was interrupted: a shard
starts at a fixed token, and the forward passes that hold its tokens are run again in full.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crosscoders import store
from crosscoders.config import CacheConfig, to_dict
from crosscoders.errors import CorruptData, InputError
from crosscoders.pair import identity
from crosscoders.progress import Progress, say
from crosscoders.source import (
    DTYPES,
    FORMAT_VERSION,
    ActivationSource,
    Plan,
    Tokens,
    concatenate,
    make_plan,
    open_source,
)

# ---------------------------------------------------------------------------------------------------------- writing


def cache_activations(config: CacheConfig) -> "ActivationCache":
    """Write the cache that `config` describes, or go on with it, and return it opened.

    Raises:
        InputError: anything that the user's settings or data get wrong; a cache made with other settings is there.
        EnvironmentFault: too little space, a second writer.
        CorruptData: a non-finite activation.
    """
    out = Path(config.out)
    bytes_per_token = 2 * DTYPES[config.dtype].itemsize
    plan = make_plan(config)
    n_bytes = config.n_tokens * (bytes_per_token * plan.info.d_model + 17)
    say(
        f"cache {config.base} and {config.tuned} at {config.hook_point}: {config.n_tokens:,} tokens, "
        f"{store.size_text(n_bytes)} to {out}"
    )
    with store.exclusive(out):
        shards = _finished_shards(out, plan.fingerprint)
        done = sum(shard["n_tokens"] for shard in shards)
        if (out / "manifest.json").is_file():
            say(f"{out} is complete already.")
            return ActivationCache(out)
        left = n_bytes * (config.n_tokens - done) // config.n_tokens
        store.require_free_space(
            out, int(left * 1.01), "Lower --n-tokens, choose another --out, or stream without a cache."
        )
        if done:
            say(f"going on at token {done:,} of {config.n_tokens:,}")
        _write_shards(out, config, plan, open_source(config, plan), shards)
    return ActivationCache(out)


def _finished_shards(out: Path, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of the whole shards that an earlier run of the same plan has left."""
    for name in ("manifest.json", "progress.json"):
        if (out / name).is_file():
            found = store.read_object(out / name, "format_version", "shards")
            changed = [key for key, value in fingerprint.items() if identity(found.get(key)) != identity(value)]
            if changed:
                key = changed[0]
                raise InputError(
                    f"{out} holds a cache with another {key} ({found.get(key)!r}, now {fingerprint[key]!r}). "
                    "Choose another --out, or remove that folder."
                )
            return list(found["shards"])
    return []


def _write_shards(
    out: Path, config: CacheConfig, plan: Plan, source: ActivationSource, shards: list[dict[str, Any]]
) -> None:
    start = sum(shard["n_tokens"] for shard in shards)
    progress = Progress("cache", total=config.n_tokens, start=start, unit="tok")
    held: list[Tokens] = []
    n_held = 0
    for part in source.read(start, config.n_tokens):
        held.append(part)
        n_held += len(part.token_ids)
        progress.update(len(part.token_ids))
        while n_held >= config.shard_tokens or (n_held and start + n_held == config.n_tokens):
            whole = concatenate(held)
            n_shard = min(config.shard_tokens, n_held)
            shards.append(_write_shard(out, len(shards), whole.slice(0, n_shard)))
            store.write_json(out / "progress.json", {**plan.fingerprint, "shards": shards})
            held, n_held, start = [whole.slice(n_shard, n_held)], n_held - n_shard, start + n_shard
    progress.close()
    manifest = {
        **plan.fingerprint,
        "context_length": config.context_length,
        "drop_bos": config.drop_bos,
        "groups": plan.rows.group_names,
        "counts": plan.rows.counts,
        "statistics": _add_statistics(shards),
        "config": to_dict(config) | {"data": [to_dict(source) for source in config.sources()]},
        "shards": shards,
    }
    store.write_json(out / "manifest.json", manifest)
    (out / "progress.json").unlink(missing_ok=True)


def _write_shard(out: Path, number: int, tokens: Tokens) -> dict[str, Any]:
    name = f"shard-{number:05d}.safetensors"
    written = store.write_tensors(out / name, tokens._asdict())
    x = tokens.activations.double()
    norms = x.norm(dim=-1)
    return {
        "name": name,
        "n_tokens": len(tokens.token_ids),
        "n_bytes": written.n_bytes,
        "checksum": written.checksum,
        # Sums in float64, added over shards at the end: running means in bfloat16 stop moving after 256 tokens.
        "sum": x.sum(dim=0).tolist(),
        "norm_sum": norms.sum(dim=0).tolist(),
        "square_sum": (norms**2).sum(dim=0).tolist(),
        "norm_max": norms.amax(dim=0).tolist(),
    }


def _add_statistics(shards: list[dict[str, Any]]) -> dict[str, Any]:
    n = sum(shard["n_tokens"] for shard in shards)
    sums = {key: np.sum([shard.pop(key) for shard in shards], axis=0) for key in ("sum", "norm_sum", "square_sum")}
    norm_max = np.max([shard.pop("norm_max") for shard in shards], axis=0)
    return {
        "n_tokens": n,
        "mean": (sums["sum"] / n).tolist(),
        "mean_norm": (sums["norm_sum"] / n).tolist(),
        "mean_squared_norm": (sums["square_sum"] / n).tolist(),
        "max_norm": norm_max.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------- reading


class ActivationCache:
    """A finished cache. Shards are checked against size and checksum when first read.

    Raises:
        InputError: no cache there, or one that is not finished.
        CorruptData: the manifest or a shard is not what was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest_path = self.path / "manifest.json"
        if not manifest_path.is_file():
            state = "is not finished" if (self.path / "progress.json").is_file() else "is not an activation cache"
            raise InputError(
                f"{str(path)!r} {state}: it has no manifest.json. Run `crosscoders cache` with --out {path}."
            )
        self.manifest = store.read_object(manifest_path, "format_version", "shards")
        found = self.manifest.get("format_version")
        if found != FORMAT_VERSION:
            raise InputError(
                f"{manifest_path} has format_version {found}, this version reads {FORMAT_VERSION}. Cache again."
            )
        for shard in self.manifest["shards"]:
            self._require_size(shard)
        self._held: tuple[int, Tokens] | None = None
        self.starts = np.cumsum([0] + [shard["n_tokens"] for shard in self.manifest["shards"]])

    def _require_size(self, shard: dict[str, Any]) -> None:
        path = self.path / shard["name"]
        if not path.is_file():
            raise CorruptData(f"{path} is missing. Restore it, or remove {self.path} and cache again.")
        if path.stat().st_size != shard["n_bytes"]:
            raise CorruptData(
                f"{path} has {path.stat().st_size} bytes but the manifest says {shard['n_bytes']}. "
                f"Restore it, or remove {self.path} and cache again."
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

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

    @functools.cached_property
    def manifest_hash(self) -> str:
        """Identity of the contents, wherever the cache and its models lie: the manifest without settings and names."""
        models = {key: identity(self.manifest.get(key)) for key in ("base", "tuned")}
        return store.hash_json({key: value for key, value in (self.manifest | models).items() if key != "config"})

    def shard(self, number: int) -> Tokens:
        """One whole shard, checked; the last one read is kept in memory."""
        if self._held is None or self._held[0] != number:
            entry = self.manifest["shards"][number]
            expected = store.Written(entry["n_bytes"], entry["checksum"])
            self._held = None  # free the old shard before the next one is read
            self._held = number, Tokens(**store.read_tensors(self.path / entry["name"], expected))
        return self._held[1]

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens start to stop, from whole shards."""
        if not 0 <= start < stop <= len(self):
            raise InputError(f"tokens {start} to {stop} asked of a cache of {len(self)}.")
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        parts = []
        for number in range(int(first), int(last) + 1):
            origin = int(self.starts[number])
            parts.append(self.shard(number).slice(max(start - origin, 0), stop - origin))
        return concatenate(parts)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tokens]:
        """Tokens in cache order, for evaluation; the last batch may be smaller."""
        stop = len(self) if stop is None else stop
        for origin, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            if end > start and origin < stop:
                tokens = self.read(max(start, origin), min(stop, end))
                for i in range(0, len(tokens.token_ids), batch_size):
                    yield tokens.slice(i, i + batch_size)
