"""Progress for people: lines on stderr, a bar on a terminal. Results never go through here."""

import os
import sys
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
    """Print one line of progress, above the bar where there is one. Where nobody reads stderr any more (`| head`, a
    lost connection), the work goes on in silence."""
    try:
        tqdm.write(line, file=sys.stderr)
    except OSError:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, sys.stderr.fileno())
        os.close(silence)


class Progress:
    """A bar with rate and time left on a terminal, nothing elsewhere."""

    def __init__(self, label: str, *, total: int, start: int = 0, unit: str = "it", hidden: bool = False) -> None:
        self.done = start
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=start,
            unit=unit,
            unit_scale=True,
            desc=label,
            leave=False,
            disable=hidden or not sys.stderr.isatty(),
        )

    def update(self, n: int) -> None:
        self.done += n
        self._bar.update(n)

    def close(self) -> None:
        self._bar.close()
