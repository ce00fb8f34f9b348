"""Lines of train.jsonl and of stderr, and the rows of an evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosscoders.common.progress import say
from crosscoders.common.results import row
from crosscoders.dictionary.metrics import Evaluation

Log = Callable[[dict[str, Any]], None]
"""Gets every line of train.jsonl too."""


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


def last_line(out: Path) -> dict[str, Any]:
    """Return the last line of train.jsonl that is about a training batch; empty where there is none."""
    lines = (json.loads(line) for line in (out / "train.jsonl").read_text().splitlines())
    return next((line for line in reversed(list(lines)) if line.get("event") != "eval"), {})


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
