"""`crosscoders cache` and `crosscoders merge`, as functions of their settings that return a JSON object."""

import shlex
import time
from typing import Any

from crosscoders.activations.cache import ActivationCache
from crosscoders.activations.caching import run_cache
from crosscoders.activations.merge import merge_parts
from crosscoders.activations.outliers import outlier_text
from crosscoders.activations.settings import CacheConfig, CacheSettings, MergeSettings
from crosscoders.activations.writer import Rates
from crosscoders.common.checks import config_of, to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.common.results import result, row, say_closing

PAPER_TOKENS = 10_000_000
"""Tokens from which the size of the papers is proposed: their 73,728 latents saw 200M, each of them twice."""


def next_command(folder: str, n_tokens: int) -> str:
    """Return a command that trains on a cache, of a size that its tokens can feed: two epochs at the size of the
    papers, at most 50 epochs of the small preset."""
    cache = shlex.quote(folder)
    if n_tokens >= PAPER_TOKENS:
        n_train = min(2 * n_tokens, 200_000_000)
        return f"crosscoders train --cache {cache} --out RUN --preset paper-batchtopk --n-tokens {n_train}"
    n_train, batch = min(50 * n_tokens, 2_457_600), min(1024, max(1, n_tokens // 16))
    return f"crosscoders train --cache {cache} --out RUN --preset demo --n-tokens {n_train} --batch-size {batch}"


def cache(settings: CacheSettings) -> dict[str, Any]:
    """Run `crosscoders cache`."""
    started = time.perf_counter()
    part = settings.chosen_part()
    written = run_cache(
        config_of(CacheConfig, settings), part=part, devices=settings.chosen_devices(), force=settings.force
    )
    rates = written.rates
    if rates.n_tokens:
        say(f"cached {rates.n_tokens:,} tokens  {rates.text()}")
    if part:
        say_closing(started, f"part {part} in {settings.out}")
        say(f"next: crosscoders merge, with the folders of all {part.of} parts and --out CACHE")
        return result("cache", to_dict(settings), _rate_rows(rates))
    rows = _describe_caches(started, list(written.folders.values())) + _rate_rows(rates)
    return result("cache", to_dict(settings), rows)


def _rate_rows(rates: Rates) -> list[dict[str, Any]]:
    """Return the rates of this run as rows; none when everything was there already."""
    if not rates.n_tokens:
        return []
    n = rates.n_tokens
    return [
        row("cache.tokens_per_second", n / rates.seconds, "tokens/s", n),
        row("cache.bytes_per_second", rates.n_bytes / rates.seconds, "bytes/s", n),
        row("cache.wait_fraction", rates.wait_seconds / rates.seconds, "fraction", n),
    ]


def merge(settings: MergeSettings) -> dict[str, Any]:
    """Run `crosscoders merge`."""
    started = time.perf_counter()
    if not settings.parts:
        raise InputError("parts is empty. Name the folders of all parts.")
    rows = _describe_caches(started, merge_parts(settings.parts, settings.out))
    say("the folders of the parts can be removed.")
    return result("merge", to_dict(settings), rows)


def _describe_caches(started: float, folders: list[str]) -> list[dict[str, Any]]:
    """Say what was made, and return the rows of `--json`; those of several hook points carry their names."""
    rows = []
    for folder in folders:
        opened = ActivationCache(folder)
        norms = opened.mean_norm
        statistics = opened.manifest["statistics"]
        n_left_out = statistics.get("left_out_tokens", 0)
        left_out = f" ({n_left_out:,} of outlying norm left out)" if n_left_out else ""
        if text := outlier_text(statistics):
            say(text)
        say_closing(
            started,
            f"{len(opened):,} tokens{left_out}, mean norm base {norms[0]:.2f} tuned {norms[1]:.2f}, in {opened.path}",
        )
        where = f".{opened.manifest['hook_point']}" if len(folders) > 1 else ""
        rows.append(row(f"cache{where}.tokens", len(opened), "tokens", len(opened)))
        rows += [
            row(f"cache{where}.mean_norm.{name}", value, "activation", len(opened))
            for name, value in zip(("base", "tuned"), norms, strict=True)
        ]
    say(f"next: {next_command(folders[0], len(ActivationCache(folders[0])))}")
    return rows
