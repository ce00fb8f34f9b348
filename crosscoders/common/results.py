"""What a run says of itself: lines of train.jsonl, lines on stderr, rows of JSON results."""

import re
import textwrap
import time
from pathlib import Path
from typing import Any

from crosscoders.common.errors import EnvironmentFault
from crosscoders.common.files import write_json
from crosscoders.common.progress import say
from crosscoders.common.provenance import environment, peak_memory_gib
from crosscoders.common.records import Record


class Row(Record):
    """A row, as `row` makes it."""

    name: str
    value: float | None
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


class ResultRecord(Record):
    """A file of results: eval.json, causal.json, what `--out FILE` writes."""

    rows: list[Row]


def row(
    name: str, value: float, unit: str, n: int, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    """Return one row of a JSON result: dotted name, value, unit, count, interval where there is one."""
    return {"name": name, "value": value, "unit": unit, "n": n, "low": low, "high": high}


def result(name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the object that --json prints; its device is that of the settings `devices` or `device`, or the CPU."""
    from crosscoders.common.devices import choose_device

    asked = str(config.get("devices") or config.get("device") or "cpu").split(",")[0].strip()
    return {"name": name, "config": config, "environment": environment(str(choose_device(asked))), "rows": rows}


def legend(header: str, meanings: dict[str, str]) -> list[str]:
    """Return the lines below a printed table that say what its columns are.

    header: its first line, in which two spaces or more part the titles. meanings: one for each title, with its unit and
    what it is over where a line above does not say so.
    """
    titles = set(re.split(r"\s{2,}", header.strip()))
    assert titles == set(meanings), sorted(titles ^ set(meanings))
    words = "; ".join(f"{title}: {meaning}" for title, meaning in meanings.items())
    return textwrap.wrap(words, 80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def publish(path: Path, described: dict[str, Any]) -> None:
    """Write a result into a run folder; where that cannot be written, say so, and what is printed is all there is."""
    try:
        write_json(path, described)
    except EnvironmentFault as error:
        say(f"warning: {error} The results are printed and nowhere else; --json prints all of them.")


def say_closing(started: float, text: str) -> None:
    """Say the last line of a command: wall time, peak memory, what it leaves behind."""
    say(f"done in {time.perf_counter() - started:.0f} s, peak memory {peak_memory_gib():.2f} GiB: {text}")
