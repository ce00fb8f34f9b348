"""Readers of null.json: counts of a run beside those of its nulls."""

from pathlib import Path
from typing import Any

from crosscoders.common.errors import InputError
from crosscoders.common.files import hash_file, read_model
from crosscoders.common.records import Record

NULL = "diffing null {run} --placebo MODEL --out {run}-null"


KINDS = ("tuned", "placebo", "format_only", "rounded")


NULL_FIELDS = {
    "crosscoders": ("kind", "seed"),
    "thresholds": (
        "null", "score", "rate", "threshold", "words", "counts", "false_positive_rate", "low", "high", "n", "held_out",
        "expected_false", "expected_false_high", "contexts", "latents",
    ),
    "fixed": ("words", "counts", "rates"),
    "curves": ("score", "thresholds", "shares"),
}  # fmt: skip


def read_nulls(run: Path) -> dict[str, Any]:
    """Return null.json of a run folder; empty where there is none, or where latents.json was made again since.

    Raises:
        InputError: an entry is missing or unknown.
        CorruptData: it is not JSON.
    """
    path, again = run / "null.json", f"Run: {NULL.format(run=run)}"
    if not path.is_file():
        return {}
    calibration = read_model(path, Record)
    if calibration.get("format_version") != 1:
        raise InputError(
            f"{path} has format_version {calibration.get('format_version')!r}; this version reads 1. {again}"
        )
    for name, fields in NULL_FIELDS.items():
        rows = calibration.get(name)
        if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
            raise InputError(f"{path} has no {name!r}. {again}")
        for row in rows:
            if missing := [field for field in fields if field not in row]:
                raise InputError(f"{path}: an entry of {name!r} has no {missing[0]!r}. {again}")
            kinds = [row["kind"]] if name == "crosscoders" else row.get("counts", row.get("shares"))
            if unknown := [kind for kind in kinds if kind not in KINDS]:
                raise InputError(f"{path} names {unknown[0]!r}; expected one of {', '.join(KINDS)}. {again}")
    return calibration if calibration.get("latents") == hash_file(path.with_name("latents.json")) else {}


def kinds_of(calibration: dict[str, Any]) -> list[str]:
    """Return `tuned`, then the nulls, in the order of null.json."""
    return list(dict.fromkeys(entry["kind"] for entry in calibration.get("crosscoders", [])))


def counts_beside(calibration: dict[str, Any]) -> dict[str, str]:
    """Return for each verdict that calls a latent specific its count on each null crosscoder of the run's seed."""
    beside = {}
    for row in calibration.get("fixed", []):
        if row["words"].startswith("verdict "):
            counts = [f"{kind} {row['counts'][kind][0]['count']:,}" for kind in kinds_of(calibration)[1:]]
            beside[row["words"].removeprefix("verdict ")] = ", ".join(counts)
    return beside
