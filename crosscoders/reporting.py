"""What a run says of itself: lines of train.jsonl, lines on stderr, rows of JSON results."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosscoders.metrics import Evaluation
from crosscoders.progress import say

Log = Callable[[dict[str, Any]], None]
"""Gets every line of train.jsonl too."""


def row(
    name: str, value: float, unit: str, n: int, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    """One row of a JSON result: dotted name, value, unit, count, interval where there is one."""
    return {"name": name, "value": value, "unit": unit, "n": n, "low": low, "high": high}


def wilson(n_hits: int, n: int) -> tuple[float, float]:
    """95% interval of a share. Source: Wilson 1927; unlike the normal interval it is right near 0 and 1."""
    share, z = n_hits / n, 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def metric_columns(found: Evaluation) -> dict[str, float]:
    """fve_<model>, l0 and dead of an evaluation."""
    names = ("base", "tuned") if len(found.fve) == 2 else tuple(str(m) for m in range(len(found.fve)))
    fve = {f"fve_{name}": value for name, value in zip(names, found.fve, strict=True)}
    return {**fve, "l0": found.l0, "dead": found.dead_fraction}


def eval_line(step: int, found: Evaluation) -> dict[str, Any]:
    """A line of train.jsonl about held-out tokens."""
    return {"event": "eval", "step": step, **metric_columns(found), "n_tokens": found.n_tokens}


def evaluation_rows(found: Evaluation) -> list[dict[str, Any]]:
    """Rows eval.fve.<model>, eval.l0, eval.dead."""
    return [
        row(f"eval.{name.replace('_', '.')}", value, "latents/token" if name == "l0" else "fraction", found.n_tokens)
        for name, value in metric_columns(found).items()
    ]


def write_line(out: Path, line: dict[str, Any], log: Log | None) -> None:
    """Append a line to train.jsonl, say it on stderr, and hand it to `log`."""
    with (out / "train.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    if log:
        log(line)
    fve = " ".join(f"{name.removeprefix('fve_')} {line[name]:.3f}" for name in line if name.startswith("fve_"))
    if line.get("event") == "eval":
        first, last = "held-out", f"n {line['n_tokens']:,} tokens"
    else:
        first, last = f"loss {line['loss']:.4f}", f"lr {line['lr']:.1e}  tok/s {line['tokens_per_second']:,}"
    say(f"step {line['step']:06d}  {first}  fve {fve}  l0 {line['l0']:.1f}  dead {line['dead']:.1%}  {last}")
