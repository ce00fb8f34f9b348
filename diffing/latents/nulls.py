"""The form of null.json and its readers: counts of a run beside those of its nulls."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from crosscoders.common.files import hash_file, read_model
from crosscoders.common.records import Record

NULL = "diffing null {run} --placebo MODEL --out {run}-null"

Kind = Literal["tuned", "placebo", "format_only", "rounded"]


class CrosscoderOf(Record):
    """A crosscoder of the pair or of a null."""

    kind: Kind
    seed: int


class Count(Record):
    """Latents of one crosscoder beyond a threshold, of so many alive ones."""

    seed: int
    count: int
    n: int


class Rate(Record):
    """A false-positive rate with its interval; None where no latent is alive."""

    false_positive_rate: float | None
    low: float
    high: float
    n: int


Counts = dict[Kind, Annotated[list[Count], Field(min_length=1)]]


class Threshold(Rate):
    """A threshold that a null fixed."""

    null: str
    score: str
    rate: float
    threshold: float | None
    words: str
    counts: Counts
    held_out: bool
    expected_false: float | None
    expected_false_high: float
    contexts: dict[str, int]
    latents: list[int]


class Fixed(Record):
    """A threshold that no null decided, with its rate on each null."""

    words: str
    counts: Counts
    rates: dict[Kind, Rate]


class Curve(Record):
    """Shares of latents at every threshold of a score."""

    score: str
    thresholds: list[float]
    shares: dict[Kind, list[float]]


class NullRecord(Record):
    """null.json"""

    version = 1
    again = "run diffing null again"
    format_version: int
    latents: str
    seed: int
    crosscoders: list[CrosscoderOf]
    thresholds: Annotated[list[Threshold], Field(min_length=1)]
    fixed: list[Fixed]
    curves: list[Curve]

    @model_validator(mode="after")
    def _agrees(self) -> "NullRecord":
        kinds = {entry.kind for entry in self.crosscoders} | {"tuned"}
        counts = [row.counts for row in self.thresholds] + [row.counts for row in self.fixed]
        if any(not kinds <= set(counted) for counted in counts):
            raise ValueError("not every crosscoder of the list is counted")
        if all(curve.score != self.thresholds[0].score for curve in self.curves):
            raise ValueError(f"no curve is of {self.thresholds[0].score!r}")
        return self


def read_nulls(run: Path) -> dict[str, Any]:
    """Return null.json of a run folder; empty where there is none, or where latents.json was made again since.

    Raises:
        InputError: it has another format version.
        CorruptData: it is not JSON, or an entry is missing, unknown or of another type.
    """
    path = run / "null.json"
    if not path.is_file():
        return {}
    calibration = read_model(path, NullRecord)
    return calibration if calibration["latents"] == hash_file(path.with_name("latents.json")) else {}


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
