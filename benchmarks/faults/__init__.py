"""Faults: wrong inputs, damage and interruptions, each played as a command, and bits flipped in every kind of file.

A fault passes where its command says in one line what is wrong, or goes on and ends with the right result. A damaged
file passes where it is refused in one line, or is harmless: the command that reads it gives what it gives for the whole
file. What was seen stands in `seen` of the result. `quick`: a flip and a cut of each file, and no faults that wait.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults import rows
from benchmarks.faults.inputs import World, make_world
from benchmarks.faults.interruptions import GROUPS
from benchmarks.faults.play import preload
from benchmarks.faults.rows import Expected
from benchmarks.faults.sweep import READERS, make_foreign, sweep
from crosscoders.common.progress import say
from crosscoders.common.results import row

FLIPS, CUTS = 9, 3
"""Of each file: over 200 flips and 50 cuts in all."""
NOT_PLAYED = {
    "07, 08, 10 in part": "the hub: gated models, busy servers, a revision that moved",
    "15, 43": "not a command: equality of padded batches and the page in a browser are in the tests",
    "20": "a disk of a chosen size", "40": "no command unpacks an archive",
    "48": "all latents dead: no small setting makes them so", "49, 50": "there are no ranks",
    "files": "null.json, say.json, replies.json, interpret.json, sets.json, finetune.json and stored states: read as "
    "those that are swept, by files.read_model and files.read_tensors",
}  # fmt: skip


def run(quick: bool, work: Path) -> dict[str, Any]:
    """Return rows `faults.<fault>` (1: passed), and of each file flips and cuts refused, harmless and believed."""
    import torch

    torch.set_num_threads(1)  # a fork has one thread
    preload()
    world = make_world(work.absolute() / "world")
    make_foreign(world)
    entries, seen = [], {}
    for name, expected in played(world, work.absolute() / "played", quick=quick):
        entries.append(row(f"faults.{name}", float(expected.is_met), "passed", 1))
        seen[name] = f"{expected.seen.status}: {expected.seen.message}"
        say(f"{'passed' if expected.is_met else 'FAILED'}  {name}: {seen[name]}")
    n_flips, n_cuts = (1, 1) if quick else (FLIPS, CUTS)
    total = {"refused": 0, "harmless": 0, "believed": 0}
    for reader in READERS:
        name = f"{reader.needs[0]}/{reader.file}".rstrip("/")
        tally = sweep(world, reader, n_flips=n_flips, n_cuts=n_cuts)
        counts = {"refused": tally.refused, "harmless": tally.harmless, "believed": len(tally.believed)}
        entries += [row(f"faults.damaged.{name}.{k}", n, "tries", n_flips + n_cuts) for k, n in counts.items() if n]
        total = {k: n + counts[k] for k, n in total.items()}
        seen |= {f"{name}, {number}": text for number, text in enumerate(tally.believed)}
        say("  ".join(f"{k} {n}" for k, n in counts.items()) + f"  {name}  {' | '.join(tally.believed)}")
    n = (n_flips + n_cuts) * len(READERS)
    entries += [row(f"faults.damaged.all.{k}", count, "tries", n) for k, count in total.items()]
    n_played = sum(entry["unit"] == "passed" for entry in entries)
    entries.append(
        row("faults.all.passed", sum(e["value"] for e in entries if e["unit"] == "passed"), "rows", n_played)
    )
    return {"name": "faults", "rows": entries, "left_out": NOT_PLAYED, "seen": seen}


def played(world: World, folder: Path, *, quick: bool) -> Iterator[tuple[str, Expected]]:
    """Play every fault, each group in an empty folder."""

    def empty(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        return folder / name

    yield from rows.wrong_settings(world, empty("settings")).items()
    yield from rows.foreign_weights(world, empty("foreign"))
    yield from rows.damaged_folders(world, empty("damaged"))
    for group in () if quick else GROUPS:
        yield from group(world, empty(group.__name__))
