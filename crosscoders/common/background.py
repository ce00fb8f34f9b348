"""One thread that writes what another computes: a bounded queue whose failures reach the computing thread.

A failure in the writer is raised by the next `put` or `check`, or at the end; what comes after it is thrown away, so
`put` cannot hang. Leaving the block waits until everything that was put is written, also when the block raised.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Background:
    """Calls `write` on each item in order, in a thread of its own.

    depth: items that wait at most; one more is being written.
    """

    def __init__(self, write: Callable[[Any], None], *, depth: int) -> None:
        self._write = write
        self._items: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._error: BaseException | None = None
        self.wait_seconds = 0.0
        """Time that `put` and the end have waited for the writer."""

    def put(self, item: Any) -> None:
        """Hand over an item; waits while the queue is full."""
        self.check()
        self._timed(lambda: self._items.put(item))

    def check(self) -> None:
        """Raise what the writer has raised."""
        if self._error is not None:
            raise self._error

    def _timed(self, act: Callable[[], None]) -> None:
        started = time.perf_counter()
        act()
        self.wait_seconds += time.perf_counter() - started

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._write(item)
                except BaseException as error:  # raised again in the computing thread
                    self._error = error
            del item  # a shard must not stay in memory until the next one comes

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        def finish() -> None:
            self._items.put(None)
            self._thread.join()

        self._timed(finish)
        if error is None:
            self.check()
