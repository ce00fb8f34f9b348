"""Shuffled batches of `cached_stream` against a reader that takes two rows a token from two memory maps."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleaved, ratio_row
from crosscoders import ActivationCache, cached_stream
from crosscoders.activations.scored import moments_of
from crosscoders.activations.settings import CacheConfig
from crosscoders.activations.shards import shard_name
from crosscoders.common.checks import to_dict
from crosscoders.common.files import write_json, write_tensors


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the row `throughput.read.speedup_over_row_indexed_memmap`."""
    return read_rows(n_tokens=2**14 if quick else 2**17)


def read_rows(n_tokens: int, d_model: int = 256, batch: int = 2048) -> list[dict[str, Any]]:
    """Read from a warm page cache; `n_tokens` is a multiple of `batch`, so an epoch holds every token once.

    Raises:
        RuntimeError: the stream gives other tokens than the cache holds.
    """
    x = torch.randn(n_tokens, 2, d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        cache = write_plain_cache(Path(folder) / "cache", x)
        maps = []
        for m in range(2):
            np.save(Path(folder) / f"{m}.npy", x[:, m].view(torch.uint16).numpy())
            maps.append(np.load(Path(folder) / f"{m}.npy", mmap_mode="r"))
        order = np.random.default_rng(0).permutation(n_tokens)
        n_batches = n_tokens // batch

        def by_rows() -> None:
            for b in range(n_batches):
                chosen = order[b * batch : (b + 1) * batch]
                pairs = [
                    torch.stack([torch.from_numpy(m[i].copy()).view(torch.bfloat16) for m in maps]) for i in chosen
                ]
                torch.stack(pairs).float()

        def by_stream() -> None:
            for rows in cached_stream(cache, batch_size=batch).batches(0, n_batches):
                rows.float()

        streamed = torch.cat([rows[:, 0, 0] for rows in cached_stream(cache, batch_size=batch).batches(0, n_batches)])
        if not torch.equal(streamed.sort().values, x[:, 0, 0].sort().values):
            raise RuntimeError("the stream gives other tokens than the cache holds, so the times do not compare.")
        seconds = interleaved({"rows": by_rows, "stream": by_stream}, n_rounds=3, n_warmup=1)
    return [ratio_row("throughput.read.speedup_over_row_indexed_memmap", seconds["rows"], seconds["stream"], "times")]


def write_plain_cache(folder: Path, x: torch.Tensor) -> ActivationCache:
    """Write a finished cache with given activations and no documents."""
    zeros = torch.zeros(len(x), dtype=torch.int32)
    columns = {name: zeros.clone() for name in ("token_ids", "positions", "document_ids", "groups")}
    written = write_tensors(folder / shard_name(0), {"activations": x, **columns, "roles": zeros.to(torch.uint8)})
    entry = {"name": shard_name(0), "n_tokens": len(x), **written._asdict()}
    n_tokens, n_models, d_model = x.shape
    moments = moments_of(x)
    config = CacheConfig(base="none", tuned="none", hook_point="blocks.0.hook_resid_post", data="none", out=str(folder))
    manifest = {
        "format_version": 1, **{key: {"name": "none", "hash": "none"} for key in ("base", "tuned")},
        **dict.fromkeys(("tokenizer_hash", "template_hash", "token_hash"), "none"), "hook_point": config.hook_point,
        "n_models": n_models, "d_model": d_model, "dtype": "bfloat16", "n_tokens": n_tokens, "drop_bos": True,
        "groups": ["none"], "counts": {}, "config": to_dict(config), "shards": [entry],
        "statistics": {
            "n_tokens": n_tokens, "mean": moments.mean, "mean_norm": moments.norm, "mean_squared_norm": moments.square,
        },
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    return ActivationCache(folder)
