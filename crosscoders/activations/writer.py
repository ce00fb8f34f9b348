"""One process of `crosscoders cache`: forward passes in one thread, shards and checksums in another.

`write_caches` goes on where an earlier run of the same plan has stopped. A shard starts at a fixed token and the
forward passes that hold its tokens are run in full, so the bytes do not depend on interruptions.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from crosscoders.activations.plan import Plan
from crosscoders.activations.scored import Tokens, concatenate
from crosscoders.activations.settings import CacheConfig, Part
from crosscoders.activations.shards import ShardWriter, bytes_per_token
from crosscoders.activations.source import ActivationSource, open_source
from crosscoders.common import files
from crosscoders.common.background import Background
from crosscoders.common.errors import Stopped
from crosscoders.common.folders import open_folder
from crosscoders.common.progress import Progress, say

Report = Callable[[int], None]
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
        """Return the rates as one line."""
        seconds = self.seconds or 1.0
        written = f"{files.size_text(self.n_bytes / seconds)}/s  " if self.n_bytes else ""
        return (
            f"{self.n_tokens / seconds:,.0f} tok/s  {written}"
            f"waited for the writer {self.wait_seconds / seconds:.1%} of {seconds:.1f} s"
        )


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Raise `Stopped` in the main thread on SIGTERM; the handler that was there is restored."""

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


def part_folder(out: str, part: Part) -> str:
    """Return where a device writes its part of the cache in `out`."""
    return f"{out}/parts/{part.number}-of-{part.of}"


def write_caches(
    config: CacheConfig, plan: Plan, part: Part | None, *, device: str | None = None, report: Report | None = None
) -> Rates:
    """Write what is missing of every hook point of a plan, or of one part of it.

    device: in place of the config's; the part then lies in `part_folder`. report: is told the tokens of each pass.
    """
    folders = [
        point.out if device is None or part is None else part_folder(point.out, part) for point in config.points()
    ]
    writers = [
        ShardWriter(point, open_folder(folder), plan, part)
        for point, folder in zip(config.points(), folders, strict=True)
    ]
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
        rates = Rates()
        if start < stop:
            source = open_source(config, plan, hook_points=[writer.hook_point for writer in writers], device=device)
            rates = _write_shards(source, writers, start, stop, report)
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


def _write_shards(
    source: ActivationSource, writers: list[ShardWriter], start: int, stop: int, report: Report | None
) -> Rates:
    """Run forward passes in this thread and write shards in another; a failure of either keeps what is whole."""
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
        seconds = max(time.perf_counter() - started, 1e-9)
        return Rates(n_done, sum(shard["n_bytes"] for shard in new), seconds, queue.wait_seconds)

    first, shard_tokens = writers[0].numbers.start, writers[0].config.shard_tokens
    started = said = time.perf_counter()
    progress = Progress("cache", total=stop, start=start, unit="tok", hidden=report is not None)
    with Background(write, depth=len(writers)) as queue:

        def counted() -> Iterator[dict[str, Tokens]]:
            nonlocal said
            for tokens_at in source.read_points(start, stop):
                queue.check()
                progress.update(n_tokens(tokens_at))
                if report is not None:
                    report(n_tokens(tokens_at))
                elif time.perf_counter() - said > SECONDS_BETWEEN_LINES:
                    said = time.perf_counter()
                    say(f"cached {progress.done:,} of {stop:,} tokens  {rates().text()}")
                yield tokens_at

        for number, pieces in enumerate(in_shards(counted(), shard_tokens), start // shard_tokens):
            for name, missing in missing_from.items():
                if number >= missing:
                    queue.put((number, name, [piece[name] for piece in pieces]))
            pieces.clear()
    progress.close()
    return rates()


def n_tokens(tokens_at: dict[str, Tokens]) -> int:
    """Count the tokens of one forward pass, the same at every hook point."""
    return len(next(iter(tokens_at.values())).token_ids)


def in_shards(passes: Iterable[dict[str, Tokens]], shard_tokens: int) -> Iterator[list[dict[str, Tokens]]]:
    """Yield forward passes cut at every `shard_tokens` tokens: the pieces of each shard, the last one shorter."""
    held: list[dict[str, Tokens]] = []
    n_held = 0
    for tokens_at in passes:
        offset, n = 0, n_tokens(tokens_at)
        while offset < n:
            cut = min(n, offset + shard_tokens - n_held)
            held.append({name: tokens.slice(offset, cut) for name, tokens in tokens_at.items()})
            offset, n_held = cut, n_held + cut - offset
            if n_held == shard_tokens:
                yield held
                held, n_held = [], 0
    if held:
        yield held
