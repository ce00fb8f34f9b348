"""Lines of train.jsonl and of stderr, and the rows of an evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.errors import CorruptData
from crosscoders.common.progress import say
from crosscoders.common.records import FileRecord
from crosscoders.common.results import ResultRecord, row
from crosscoders.dictionary.metrics import Evaluation

Log = Callable[[dict[str, Any]], None]
"""Gets every line of train.jsonl too."""


class EvalRecord(ResultRecord):
    """eval.json of a run."""

    log: FileRecord | None = None
    """Of train.jsonl, which has ended."""


def metric_columns(evaluation: Evaluation) -> dict[str, float]:
    """Return fve_<model>, l0 and dead of an evaluation."""
    fve = {f"fve_{name}": value for name, value in zip(_names(evaluation), evaluation.fve, strict=True)}
    return {**fve, "l0": evaluation.l0, "dead": evaluation.dead_fraction}


def heldout_columns(evaluation: Evaluation) -> dict[str, float]:
    """Return metric_columns, and fve_rest_<model>."""
    rest = {f"fve_rest_{name}": value for name, value in zip(_names(evaluation), evaluation.fve_rest, strict=True)}
    return {**metric_columns(evaluation), **rest}


def _names(evaluation: Evaluation) -> tuple[str, ...]:
    return ("base", "tuned") if len(evaluation.fve) == 2 else tuple(str(m) for m in range(len(evaluation.fve)))


def eval_line(step: int, evaluation: Evaluation) -> dict[str, Any]:
    """Return a line of train.jsonl about held-out tokens."""
    return {"event": "eval", "step": step, **heldout_columns(evaluation), "n_tokens": evaluation.n_tokens}


def evaluation_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the rows eval.fve.<model>, eval.l0, eval.dead, eval.fve_rest.<model>."""
    rows = [
        row(
            f"eval.{name.replace('_', '.')}",
            value,
            "latents/token" if name == "l0" else "fraction",
            evaluation.n_tokens,
        )
        for name, value in metric_columns(evaluation).items()
    ]
    rest = zip(_names(evaluation), evaluation.fve_rest, evaluation.n_rest, strict=True)
    return rows + [row(f"eval.fve_rest.{name}", value, "fraction", n) for name, value, n in rest]


def log_entry(out: Path) -> dict[str, Any]:
    """Return what eval.json, which is written when training has ended, says of train.jsonl."""
    return {"log": files.written(out / "train.jsonl")._asdict()}


def require_log(out: Path) -> None:
    """Raise CorruptData where train.jsonl is not the one that eval.json describes; earlier versions describe none."""
    expected = files.read_model(out / "eval.json", EvalRecord).get("log") if (out / "eval.json").is_file() else None
    if expected and files.written(out / "train.jsonl")._asdict() != expected:
        raise CorruptData(
            f"{out / 'train.jsonl'} is not the file that eval.json describes. Restore it, or train again."
        )


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
    words = {name.removeprefix("fve_").replace("_", " "): line[name] for name in line if name.startswith("fve_")}
    fve = " ".join(f"{name} {value:.3f}" for name, value in words.items())
    if line.get("event") == "eval":
        first, last = "held-out", f"n {line['n_tokens']:,} tokens"
    else:
        first, last = f"loss {line['loss']:.4f}", f"lr {line['lr']:.1e}  tok/s {line['tokens_per_second']:,}"
    say(f"step {line['step']:06d}  {first}  fve {fve}  l0 {line['l0']:.1f}  dead {line['dead']:.1%}  {last}")
