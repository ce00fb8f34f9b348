"""Measure several implementations in turn, so that other work on the machine touches all of them alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[Callable[[], object]], float]
"""Runs something and gives the seconds it took."""


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of this process, all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def cuda_seconds(run: Callable[[], object]) -> float:
    """Time on the current CUDA stream, from event to event."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(
    parts: dict[str, Callable[[], object]], *, n_rounds: int, n_warmup: int = 2, clock: Clock = cpu_seconds
) -> dict[str, list[float]]:
    """Return the seconds of each part and round, after the warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for i in range(n_warmup + n_rounds):
        for name, run in parts.items():
            spent = clock(run)
            if i >= n_warmup:
                seconds[name].append(spent)
    return seconds


def median_row(name: str, values: list[float], unit: str, note: str = "") -> dict[str, Any]:
    """Return the median over rounds; low and high are the quartiles, null where there is one value only."""
    low, high = None, None
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4)
    row = {"name": name, "value": statistics.median(values), "unit": unit, "n": len(values), "low": low, "high": high}
    return row | ({"note": note} if note else {})


def ratio_row(name: str, seconds: list[float], reference: list[float], unit: str, note: str = "") -> dict[str, Any]:
    """Return the median of the ratios, round by round, with their quartiles."""
    return median_row(name, [a / b for a, b in zip(seconds, reference, strict=True)], unit, note)
