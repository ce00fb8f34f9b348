"""Step 2 of the data flow, middle: what an `ActivationSource` yields -> caches on disk, whole, in parts, on devices.

`run_cache` plans, checks and writes; `cache_activations` is the same for one cache. A shard starts at a fixed token and
the forward passes that hold its tokens are run in full, so the same plan gives the same bytes whether or not the run
was interrupted, at one hook point or at several, in one process or in parts that are merged.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from crosscoders import memory, store
from crosscoders.background import Background
from crosscoders.cache import ActivationCache
from crosscoders.config import CacheConfig, Part
from crosscoders.errors import InputError, Stopped
from crosscoders.folder import open_folder
from crosscoders.pair import choose_device
from crosscoders.progress import Progress, say
from crosscoders.shards import ShardWriter, bytes_per_token
from crosscoders.source import Plan, Tokens, concatenate, make_plan, open_source

SECONDS_BETWEEN_LINES = 30


class Rates(NamedTuple):
    """What a run of `crosscoders cache` has done; shards of earlier runs are not counted."""

    n_tokens: int = 0
    """Tokens at each hook point."""
    n_bytes: int = 0
    """Bytes of all shards."""
    seconds: float = 0.0
    """From the first forward pass to the last write."""
    wait_seconds: float = 0.0
    """Time in which the forward passes waited for the writer."""

    def text(self) -> str:
        """One line."""
        seconds = max(self.seconds, 1e-9)
        return (
            f"{self.n_tokens / seconds:,.0f} tok/s  {store.size_text(self.n_bytes / seconds)}/s  "
            f"waited for the writer {self.wait_seconds / seconds:.1%} of {seconds:.1f} s"
        )


class CacheRun(NamedTuple):
    """What `run_cache` leaves behind."""

    folders: dict[str, str]
    """Folder of the cache, or of the part, at each hook point."""
    rates: Rates


def cache_activations(config: CacheConfig) -> ActivationCache:
    """Write the cache that `config` describes, or go on with it, and return it opened.

    Raises:
        InputError: anything that the user's settings or data get wrong; a cache made with other settings is there;
            several hook points (then `run_cache`).
        EnvironmentFault: too little space, a second writer.
        CorruptData: a non-finite activation.
    """
    if not isinstance(config.hook_point, str):
        raise InputError("cache_activations makes one cache; for several hook points call crosscoders.run_cache.")
    return ActivationCache(run_cache(config).folders[config.hook_point])


def run_cache(config: CacheConfig, *, part: Part | None = None) -> CacheRun:
    """Write the caches that `config` describes, one for each hook point, or one part of each, or go on with them.

    Raises: as `cache_activations`.
    """
    with _stopped_by_sigterm():
        device = choose_device(config.device)
        plan = make_plan(config)
        points = config.points()
        n_bytes = config.n_tokens * bytes_per_token(config, plan.info.d_model) * len(points)
        needed = memory.require(
            memory.cache_need(config, plan, n_points=len(points), device=device),
            "Lower --batch-rows, --context-length or --shard-tokens, or name fewer hook points.",
        )
        say(
            f"cache {config.base} and {config.tuned} at {', '.join(str(point.hook_point) for point in points)}: "
            f"{f'part {part} of ' if part else ''}{config.n_tokens:,} tokens, {store.size_text(n_bytes)} to "
            f"{config.out}; needs {needed}"
        )
        rates = write_caches(config, plan, part)
        return CacheRun({str(point.hook_point): point.out for point in points}, rates)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `Stopped` in the main thread; the handler that was there is restored."""

    def stop(number: int, frame: object) -> None:
        raise Stopped("stopped on request; whole shards are kept. Run the same command to go on.")

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are somebody else's business
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_caches(config: CacheConfig, plan: Plan, part: Part | None) -> Rates:
    """Write what is missing of every hook point of a plan."""
    writers = [ShardWriter(point, open_folder(point.out), plan, part) for point in config.points()]
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer.folder.exclusive())
            writer.resume()
        for writer in writers:
            if writer.is_complete:
                say(f"{writer.folder} is complete already.")
        writers = [writer for writer in writers if not writer.is_complete]
        if not writers:
            return Rates()
        numbers = range(min(writer.next_shard for writer in writers), writers[0].numbers.stop)
        start, stop = (min(n * config.shard_tokens, config.n_tokens) for n in (numbers.start, numbers.stop))
        _require_space(config, plan, writers, stop)
        if numbers.start > writers[0].numbers.start:
            say(f"going on at token {start:,} of {stop:,}")
        rates = _write_shards(config, plan, writers, start, stop) if start < stop else Rates()
        for writer in writers:
            writer.finish()
        return rates


def _require_space(config: CacheConfig, plan: Plan, writers: list[ShardWriter], stop: int) -> None:
    per_token = bytes_per_token(config, plan.info.d_model)
    for number, writer in enumerate(writers):
        missing = sum(stop - writer.next_shard * config.shard_tokens for writer in writers[: number + 1])
        writer.folder.require_space(
            int(missing * per_token * 1.01),
            config.shard_tokens * per_token,
            "Lower --n-tokens, choose another --out, or stream without a cache.",
        )


def _write_shards(config: CacheConfig, plan: Plan, writers: list[ShardWriter], start: int, stop: int) -> Rates:
    """Forward passes in this thread, shards in another; a failure of either keeps what is whole."""
    source = open_source(config, plan, hook_points=[writer.hook_point for writer in writers])
    by_point = {writer.hook_point: writer for writer in writers}
    missing_from = {writer.hook_point: writer.next_shard for writer in writers}

    def write(item: tuple[int, str, list[Tokens]]) -> None:
        number, hook_point, pieces = item
        tokens = concatenate(pieces)
        pieces.clear()  # the pieces and the shard together would be two shards in memory
        by_point[hook_point].write(number, tokens)

    def rates() -> Rates:
        new = [shard for writer in writers for shard in writer.shards[missing_from[writer.hook_point] - first :]]
        n_done = progress.done - start
        return Rates(n_done, sum(shard["n_bytes"] for shard in new), time.perf_counter() - started, queue.wait_seconds)

    first = writers[0].numbers.start
    started = said = time.perf_counter()
    progress = Progress("cache", total=stop, start=start, unit="tok")
    with Background(write, depth=len(writers)) as queue:

        def counted() -> Iterator[dict[str, Tokens]]:
            nonlocal said
            for found in source.read_points(start, stop):
                queue.check()
                progress.update(n_tokens(found))
                if time.perf_counter() - said > SECONDS_BETWEEN_LINES:
                    said = time.perf_counter()
                    say(f"cached {progress.done:,} of {stop:,} tokens  {rates().text()}")
                yield found

        for number, pieces in enumerate(in_shards(counted(), config.shard_tokens), start // config.shard_tokens):
            for name, missing in missing_from.items():
                if number >= missing:
                    queue.put((number, name, [piece[name] for piece in pieces]))
    progress.close()
    return rates()


def n_tokens(found: dict[str, Tokens]) -> int:
    """Tokens of one forward pass, the same at every hook point."""
    return len(next(iter(found.values())).token_ids)


def in_shards(passes: Iterable[dict[str, Tokens]], shard_tokens: int) -> Iterator[list[dict[str, Tokens]]]:
    """Forward passes cut at every `shard_tokens` tokens: the pieces of each shard, the last one shorter."""
    held: list[dict[str, Tokens]] = []
    n_held = 0
    for found in passes:
        offset, n = 0, n_tokens(found)
        while offset < n:
            cut = min(n, offset + shard_tokens - n_held)
            held.append({name: tokens.slice(offset, cut) for name, tokens in found.items()})
            offset, n_held = cut, n_held + cut - offset
            if n_held == shard_tokens:
                yield held
                held, n_held = [], 0
    if held:
        yield held
