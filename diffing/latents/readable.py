"""Whether the latents of a run may be read: what its held-out figures and its latent table say against it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas

from crosscoders.common import files
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord
from crosscoders.dictionary.health import complaints
from crosscoders.training.log import last_line


def reasons(
    *,
    evaluation: Iterable[Mapping[str, Any]],
    training: Mapping[str, Any],
    k: int | None,
    n_active: Sequence[int],
    frequency: Sequence[float | None],
) -> list[str]:
    """Return what speaks against the dictionary of a run; empty where nothing does.

    evaluation: rows of eval.json. training: the last line of train.jsonl about a batch. n_active, frequency: columns of
    the latent table, which decide where the held-out figures say nothing.
    """
    heldout = _numbers({row["name"].removeprefix("eval.").replace(".", "_"): row.get("value") for row in evaluation})
    table = {
        "l0": sum(share for share in frequency if share is not None),
        "dead": sum(n == 0 for n in n_active) / max(1, len(n_active)),
    }
    return complaints(heldout, k=k, training=_numbers(training)) or complaints(
        table, k=k, tokens="the tokens of the latent table"
    )


def run_reasons(run: Path, table: pandas.DataFrame) -> list[str]:
    """Return what speaks against the dictionary of a run folder with that latent table."""
    return reasons(
        evaluation=evaluation_of(run),
        training=last_line(run) if (run / "train.jsonl").is_file() else {},
        k=k_of(run),
        n_active=table["n_active"].tolist(),
        frequency=table["frequency"].tolist(),
    )


def evaluation_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of eval.json; empty where there is none."""
    path = run / "eval.json"
    rows: list[dict[str, Any]] = files.read_model(path, ResultRecord)["rows"] if path.is_file() else []
    return rows


def k_of(run: Path) -> int | None:
    """Return the active latents per token that a crosscoder of ours was trained for; None where that is not known."""
    path = run / "config.json"
    shape = files.read_model(path, Record).get("crosscoder") if path.is_file() else None
    return shape.get("k") if isinstance(shape, dict) else None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if type(value) in (int, float)}
