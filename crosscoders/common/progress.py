"""Progress for people: lines on stderr, a bar on a terminal. Results never go through here."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SILENCE = 15.0
"""Seconds without a line after which one says how far the work is, where there is no terminal for a bar."""
_said_at = time.monotonic()
_about: ContextVar[tuple[str, ...]] = ContextVar("about", default=())


def say(line: str) -> None:
    """Print one line of progress, above the bar where there is one. Where nobody reads stderr any more (`| head`, a
    lost connection), the work goes on in silence."""
    global _said_at
    _said_at = time.monotonic()
    try:
        tqdm.write(line, file=sys.stderr)
    except OSError:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, sys.stderr.fileno())
        os.close(silence)


@contextlib.contextmanager
def about(words: str) -> Iterator[None]:
    """Name the bars made meanwhile by `words` too, where a command does the same work more than once."""
    token = _about.set((*_about.get(), words))
    try:
        yield
    finally:
        _about.reset(token)


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a line where nothing was said for a while."""

    def __init__(self, label: str, *, total: int, start: int = 0, unit: str = "it", hidden: bool = False) -> None:
        self.done, label = start, ", ".join((label, *_about.get()))
        self._line = f"{label}  {{:,}} of {total:,} {unit}"
        self._is_bar, self._is_hidden = sys.stderr.isatty(), hidden
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=start,
            unit=unit,
            unit_scale=True,
            desc=label,
            leave=False,
            disable=hidden or not self._is_bar,
        )

    def update(self, n: int) -> None:
        self.done += n
        self._bar.update(n)
        if not self._is_bar and not self._is_hidden and time.monotonic() - _said_at > SILENCE:
            say(self._line.format(self.done))

    def close(self) -> None:
        self._bar.close()


def watched(things: Iterable[T], label: str, *, total: int, unit: str, size: Callable[[T], int]) -> Iterator[T]:
    """Yield the things, such as batches, with their progress; size: how many units each of them is."""
    progress = Progress(label, total=total, unit=unit)
    try:
        for thing in things:
            yield thing
            progress.update(size(thing))
    finally:
        progress.close()
