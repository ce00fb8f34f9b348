r"""Every diffing method on the embedded pair, on planted organisms with their dilutions, and on pairs without anything.

Cheap methods run on three seeds everywhere, trained ones on one seed of undiluted organisms; then what LoRA adds
(`delta`). A method finds by the rules of docs/math.md, "One table"; on pairs without behaviour nothing is to be found.
`quick`: three organisms of few steps, one seed.
"""

import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.methods.cases import PAIRS, Case, each_case
from benchmarks.methods.delta import delta_rows
from benchmarks.methods.table import methods_table
from benchmarks.organisms.texts import ORGANISMS
from crosscoders.common.errors import InputError, nearest
from crosscoders.common.progress import say
from crosscoders.common.results import row
from diffing.comparison.command import blocks_of, compare
from diffing.comparison.settings import CHEAP, TRAINED, CompareSettings

SEEDS = 3
DELTA = "delta"
BENCHED = tuple(name for name in TRAINED if name != "decomposition")
"""A decomposition takes as long as all others together; `decompose` has it on an organism of its own."""
PIECES, TRAINED_PIECES = [1, 2, 4, 8, 16, 32], [1, 4, 16, 32, 64, 128, 256]
ORGANISM_TOKENS, ORGANISM_STEPS = 1_024_000, 200
"""What trained methods get on organisms, whose tuning is a fifth as long as the embedded pair's."""


def run(quick: bool, work: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return rows `methods.*`.

    work: folder in which everything that is finished is kept; only: pairs, organisms, or `delta` (what LoRA adds).

    Raises:
        InputError: no part of that name.
    """
    for name in only:
        if name not in (known := [*PAIRS, DELTA]):
            raise InputError(f"methods has no part {name!r}{nearest(name, known)} There are {', '.join(known)}.")
    work = work / ("quick" if quick else "full")
    rows: list[dict[str, Any]] = []
    of_null: dict[tuple[str, ...], Path] = {}
    chosen = tuple(name for name in only if name != DELTA)
    for case in each_case(quick, work, chosen) if chosen or not only else ():
        say(f"methods: {case.name}")
        out = work / "compare" / case.name
        share_null(of_null.setdefault((case.base, case.null, str(case.data), case.truth), out), out)
        settings = case_settings(case, out, quick=quick)
        rows += case_rows(case, settings)
        if case.is_trained and not quick:
            listed = {entry["name"] for entry in rows}
            of_trained = case_rows(case, replace(settings, methods=list(BENCHED), n_seeds=1, pieces=TRAINED_PIECES))
            rows += [entry for entry in of_trained if entry["name"] not in listed]
    rows += alarm_rows(rows)
    if not only or DELTA in only:
        rows += delta_rows(work / "delta", quick=quick)
    return {"name": "methods", "rows": rows, "text": methods_table(rows)}


def share_null(first: Path, out: Path) -> None:
    """Copy what the null gave in another comparison of the same base, null and data; `compare` checks that it fits."""
    for path in (first / "null").glob("seed-*/*.json"):
        if not (copied := out / path.relative_to(first)).is_file():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)


def case_settings(case: Case, out: Path, *, quick: bool) -> CompareSettings:
    """Return the settings of the cheap methods on one case."""
    settings = CompareSettings(
        base=case.base, tuned=case.tuned, null=case.null, data=case.data,
        train_data=case.train_data, truth=case.truth, out=str(out),
        methods=list(CHEAP), pieces=PIECES, n_tokens=12_000, context_length=128, n_seeds=SEEDS, device="cpu",
    )  # fmt: skip
    if case.name.startswith(ORGANISMS):  # their held-out text has little more than 8,000 tokens
        settings = replace(settings, n_tokens=8000, train_tokens=ORGANISM_TOKENS, distil_steps=ORGANISM_STEPS)
    if not quick:
        return settings
    return replace(
        settings, pieces=[1, 4, 16], n_tokens=4000, n_documents=20, n_prompts=10, n_samples=40, n_seeds=1,
        random_draws=1, max_new_tokens=24,
    )  # fmt: skip


def case_rows(case: Case, settings: CompareSettings) -> list[dict[str, Any]]:
    """Return the rows of one comparison as methods.<case>.<method>[.null][.random].*."""
    block = blocks_of(settings)
    rows = []
    for entry in compare(settings)["rows"]:
        _, which, kind, *rest = entry["name"].split(".")
        if kind == "behaviour" and which == "tuned":
            rows.append(entry | {"name": f"methods.{case.name}.planted.{'.'.join(rest)}"})
        elif kind in block.values() and rest[0] in block:
            words = [rest[0], *(["null"] if which == "null" else []), *rest[1:]]
            rows.append(entry | {"name": f"methods.{case.name}.{'.'.join(words)}"})
    return [*rows, row(f"methods.{case.name}.is_null", int(case.is_null), "pairs", 1)]


def alarm_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows methods.false_alarms.<method> and methods.detections.<method>: shares of cases in which it found."""
    is_null = {entry["name"].split(".")[1]: entry["value"] for entry in rows if entry["name"].endswith(".is_null")}
    found: dict[str, dict[bool, list[float]]] = {}
    for entry in rows:
        _, case, method, *rest = entry["name"].split(".")
        if rest == ["found"]:
            found.setdefault(method, {True: [], False: []})[bool(is_null[case])].append(entry["value"])
    return [
        row(f"methods.{word}.{method}", statistics.fmean(values[is_null]), "share of pairs", len(values[is_null]))
        for method, values in found.items()
        for is_null, word in ((False, "detections"), (True, "false_alarms"))
        if values[is_null]
    ]
