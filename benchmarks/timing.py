"""Interleaved timing: the parts of a comparison run in turn in one loop, and ratios are taken round by round."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def interleaved(parts: dict[str, Callable[[], object]], *, n_rounds: int, n_warmup: int = 2) -> dict[str, list[float]]:
    """CPU seconds of this process for each part and round, after the warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for i in range(n_warmup + n_rounds):
        for name, run in parts.items():
            start = time.process_time()
            run()
            if i >= n_warmup:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio_row(name: str, seconds: list[float], reference: list[float], unit: str) -> dict[str, Any]:
    """Median of the ratios, round by round; low and high are their quartiles."""
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"name": name, "value": middle, "unit": unit, "n": len(ratios), "low": low, "high": high}
