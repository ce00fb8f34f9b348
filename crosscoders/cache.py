"""Step 2 of the data flow: tokens -> paired activations, on disk or on the fly.

`ActivationSource` runs both models over a plan of rows and yields scored tokens in a fixed order; `cache_activations`
writes them as shards of [tokens, n_models, d_model] with the manifest last; `ActivationCache` reads them back. The same
plan gives the same bytes whether or not the run was interrupted: a shard starts at a fixed token, and the forward
passes that hold its tokens are run again in full.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from crosscoders import store
from crosscoders.config import CacheConfig, to_dict
from crosscoders.errors import CorruptData, InputError
from crosscoders.pair import ModelPair, PairInfo, inspect_pair, load_pair
from crosscoders.progress import Progress, say
from crosscoders.tokens import Rows, iterate_scored, pad_rows, read_template, tokenize_documents

FORMAT_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Tokens(NamedTuple):
    """Scored tokens with their activations, in cache order."""

    activations: Float[Tensor, "tokens n_models d_model"]
    """In the dtype of the cache."""
    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    """Position in the row, counted from 0 with the beginning-of-sequence token."""
    document_ids: Int[Tensor, " tokens"]
    roles: UInt8[Tensor, " tokens"]
    """Index into `tokens.ROLES`."""
    groups: Int[Tensor, " tokens"]
    """Index into the manifest's `groups`."""

    def slice(self, start: int, stop: int) -> "Tokens":
        return Tokens(*(t[start:stop] for t in self))


def concatenate(parts: list[Tokens]) -> Tokens:
    return Tokens(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class ActivationSource:
    """Runs the pair over planned rows. Token number t is the same token in every run of the same plan."""

    def __init__(self, pair: ModelPair, rows: Rows, *, hook_point: str, batch_rows: int, dtype: torch.dtype) -> None:
        self.pair, self.rows, self.hook_point, self.dtype = pair, rows, hook_point, dtype
        self.batches = rows.batches(batch_rows)
        self.spans = list(iterate_scored(rows, self.batches))
        pad = pair.info.tokenizer.pad_token_id
        self.pad_id = 0 if pad is None else int(pad)

    def read(self, start: int, stop: int) -> Iterator[Tokens]:
        """Scored tokens start to stop, forward pass by forward pass."""
        for numbers, (first, last) in zip(self.batches, self.spans, strict=True):
            if last > start and first < stop:
                yield self._run(numbers).slice(max(start - first, 0), min(stop, last) - first)

    def _run(self, numbers: Int[np.ndarray, " rows"]) -> Tokens:
        batch = pad_rows(self.rows, numbers, self.pad_id)
        scored = torch.from_numpy(batch.scored)
        x = self.pair.activations(batch, self.hook_point)[scored.to(self.pair.device)]
        positions = torch.arange(scored.shape[1]).expand(scored.shape)[scored]
        documents = torch.from_numpy(batch.rows)[:, None].expand(scored.shape)[scored]
        self._require_finite(x, documents, positions)
        row_starts = torch.from_numpy(self.rows.offsets)[documents]
        return Tokens(
            activations=x.to(self.dtype).cpu(),
            token_ids=torch.from_numpy(batch.ids)[scored].int(),
            positions=positions.int(),
            document_ids=documents.int(),
            roles=torch.from_numpy(self.rows.roles)[row_starts + positions],
            groups=torch.from_numpy(self.rows.groups)[documents].int(),
        )

    def _require_finite(
        self,
        x: Float[Tensor, "tokens n_models d_model"],
        documents: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
    ) -> None:
        finite = torch.isfinite(x.to(self.dtype)).all(dim=-1).cpu()
        if finite.all():
            return
        token, model = (~finite).nonzero()[0].tolist()
        name = (self.pair.info.base, self.pair.info.tuned)[model]
        raise CorruptData(
            f"model {name!r} gives a non-finite activation at {self.hook_point!r}, "
            f"document {int(documents[token])}, position {int(positions[token])}. "
            "Whole shards are kept. Use --model-dtype float32, or take the document out."
        )


# ---------------------------------------------------------------------------------------------------------- writing


class _Plan(NamedTuple):
    info: PairInfo
    rows: Rows
    fingerprint: dict[str, Any]
    """Everything that decides the bytes of the cache."""


def _make_plan(config: CacheConfig) -> _Plan:
    """Tokenise and check everything that can be wrong before a model loads."""
    info = inspect_pair(config.base, config.tuned, [config.hook_point], tokenizer=config.tokenizer)
    template = read_template(config.chat_template)
    rows = tokenize_documents(config, info.tokenizer, template)
    fingerprint = {
        "format_version": FORMAT_VERSION,
        **info.hashes(),
        "template_hash": store.hash_json(template or info.tokenizer.chat_template),
        "token_hash": store.hash_json(
            [
                store.checksum(array.tobytes())
                for array in (rows.ids, rows.roles, rows.scored, rows.offsets, rows.groups)
            ]
        ),
        "hook_point": config.hook_point,
        "n_models": 2,
        "d_model": info.d_model,
        "dtype": config.dtype,
        "model_dtype": config.model_dtype,
        "n_tokens": config.n_tokens,
        "shard_tokens": config.shard_tokens,
        "batch_rows": config.batch_rows,
    }
    return _Plan(info, rows, fingerprint)


def cache_activations(config: CacheConfig) -> "ActivationCache":
    """Write the cache that `config` describes, or go on with it, and return it opened.

    Raises:
        InputError: anything that the user's settings or data get wrong; a cache made with other settings is there.
        EnvironmentFault: too little space, a second writer.
        CorruptData: a non-finite activation.
    """
    out = Path(config.out)
    bytes_per_token = 2 * DTYPES[config.dtype].itemsize
    plan = _make_plan(config)
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
        pair = load_pair(
            config.base, config.tuned, config.hook_point, device=config.device, dtype=config.model_dtype, info=plan.info
        )
        source = ActivationSource(
            pair, plan.rows, hook_point=config.hook_point, batch_rows=config.batch_rows, dtype=DTYPES[config.dtype]
        )
        _write_shards(out, config, plan, source, shards)
    return ActivationCache(out)


def _finished_shards(out: Path, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of the whole shards that an earlier run of the same plan has left."""
    for name in ("manifest.json", "progress.json"):
        if (out / name).is_file():
            found = store.read_json(out / name)
            changed = [key for key, value in fingerprint.items() if found.get(key) != value]
            if changed:
                key = changed[0]
                raise InputError(
                    f"{out} holds a cache with another {key} ({found.get(key)!r}, now {fingerprint[key]!r}). "
                    "Choose another --out, or remove that folder."
                )
            return list(found["shards"])
    return []


def _write_shards(
    out: Path, config: CacheConfig, plan: _Plan, source: ActivationSource, shards: list[dict[str, Any]]
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
        self.manifest: dict[str, Any] = store.read_json(manifest_path)
        found = self.manifest.get("format_version")
        if found != FORMAT_VERSION:
            raise InputError(
                f"{manifest_path} has format_version {found}, this version reads {FORMAT_VERSION}. Cache again."
            )
        for shard in self.manifest["shards"]:
            self._require_size(shard)
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
        return store.hash_json(self.manifest)

    def shard(self, number: int) -> Tokens:
        """One whole shard."""
        entry = self.manifest["shards"][number]
        return Tokens(
            **store.read_tensors(self.path / entry["name"], store.Written(entry["n_bytes"], entry["checksum"]))
        )

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

    def document_tokens(self) -> Int[Tensor, " tokens"]:
        """Document id of every token."""
        return torch.cat([self.shard(i).document_ids for i in range(len(self.manifest["shards"]))])
