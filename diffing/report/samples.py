"""What the models say: the report's section on say.json and replies.json, where a run folder has them.

Reading order: `read_say` and `read_replies`, then `phrase_lines`, `sample_lines` and `feature_lines` of the tables.
"""

from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.files import read_model
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord
from diffing.report.data import Run
from diffing.report.text import NONE

SAY = "diffing say --base BASE --tuned TUNED --out {run}/say.json"
REPLIES = "diffing replies --base BASE --tuned TUNED --out {run}/replies.json"
SHOWN_PHRASES = 20
SHOWN_SAMPLES = 12


class PhraseRecord(Record):
    """A phrase of say.json."""

    phrase: str
    z: float
    n_tuned: int
    n_base: int
    examples: list[str]
    beyond_null: bool | None


class SampleRecord(Record):
    """A sample of say.json."""

    strength: float
    text: str
    gain: float


class SayRecord(Record):
    """say.json of a run folder."""

    version = 1
    again = "run diffing say again"
    format_version: int
    n_pairs: int
    phrases: list[PhraseRecord]
    top_samples: list[SampleRecord]
    null: dict[str, Any] | None


class RepliesRecord(ResultRecord):
    """replies.json of a run folder."""

    version = 1
    again = "run diffing replies again"
    format_version: int
    replies: list[dict[str, str]]


class PhraseLine(NamedTuple):
    """One phrase, as text."""

    phrase: str
    n_tuned: str
    n_base: str
    null: str
    """Whether the null's samples have it less often too."""
    example: str


def read_say(run: Path) -> dict[str, Any]:
    """Return say.json of a run folder; empty where there is none."""
    return read_model(run / "say.json", SayRecord) if (run / "say.json").is_file() else {}


def read_replies(run: Path) -> dict[str, Any]:
    """Return replies.json of a run folder; empty where there is none."""
    return read_model(run / "replies.json", RepliesRecord) if (run / "replies.json").is_file() else {}


def phrase_lines(run: Run) -> list[PhraseLine]:
    """Return the most distinctive phrases."""
    words = {None: NONE, True: "beyond it", False: "as often"}
    return [
        PhraseLine(
            entry["phrase"],
            f"{entry['n_tuned']:,}",
            f"{entry['n_base']:,}",
            words[entry["beyond_null"]],
            next(iter(entry["examples"]), ""),
        )
        for entry in run.say["phrases"][:SHOWN_PHRASES]
    ]


def sample_lines(run: Run) -> list[tuple[str, str, str]]:
    """Return gain, strength and text of the samples that the tuned model finds likely and the base does not."""
    return [
        (f"{entry['gain']:.2f}", f"{entry['strength']:g}", entry["text"])
        for entry in run.say["top_samples"][:SHOWN_SAMPLES]
    ]


def feature_lines(run: Run) -> list[tuple[str, str, str, str]]:
    """Return name, base, tuned and change with its interval of what was measured on the replies."""
    rows = {row["name"]: row for row in run.replies["rows"]}
    names = [name.split(".")[1] for name in rows if name.startswith("replies.") and name.endswith(".change")]
    lines = []
    for name in names:
        base, tuned = (f"{rows[f'replies.{name}.{which}']['value']:.2f}" for which in ("base", "tuned"))
        change = rows[f"replies.{name}.change"]
        interval = f" ({change['low']:+.2f} to {change['high']:+.2f})" if change.get("low") is not None else ""
        lines.append((name.replace("_", " "), base, tuned, f"{change['value']:+.2f}{interval}"))
    return lines
