r"""Parameter decomposition where the answer is known: toy models of superposition, and planted changes of weights.

A row is a mean over seeds, low and high its 95% interval (Student's t over seeds, null for one), n the seeds.
`planted`: six behaviours in one matrix, to be told apart by when they matter alone. `new-features`: a toy model that
learned more features. Controls: a change without effect, and one that every input needs. `organism`: two behaviours in
one LoRA of the embedded base; `word`: whether a piece of its attention finds the word that brings one of them.
`quick`: one seed of the planted change, of the change without effect and of one toy.
"""

from pathlib import Path
from typing import Any

from benchmarks.decompose.organism_run import organism_run
from benchmarks.decompose.runs import RUNS
from benchmarks.decompose.word import word_run
from benchmarks.planted import over_seeds
from crosscoders.common import files
from crosscoders.common.progress import say
from crosscoders.common.records import Record

SEEDS = {"organism": 2}
"""Seeds of a part, of the others three."""
ORGANISM = {"organism": organism_run, "word": word_run}
QUICK = ("planted", "no-effect", "tms-5-2")


class ValuesRecord(Record):
    """Values of one part and seed."""

    values: dict[str, Any]


def run(quick: bool, work: Path) -> dict[str, Any]:
    """Return rows `decompose.<toy>.*`; `work`: folder in which the values of each seed are kept."""
    rows: list[dict[str, Any]] = []
    for name in QUICK if quick else (*RUNS, *ORGANISM):
        values = []
        for seed in range(1 if quick else SEEDS.get(name, 3)):
            path = work / f"{name}-seed-{seed}.json"
            if not path.is_file():
                say(f"decompose {name}, seed {seed}")
                of_seed = ORGANISM[name](work, seed) if name in ORGANISM else RUNS[name](seed)
                files.write_json(path, {"values": of_seed})
            values.append(
                {key: (value, unit) for key, (value, unit) in files.read_model(path, ValuesRecord)["values"].items()}
            )
        rows += over_seeds(f"decompose.{name}", values)
    return {"name": "decompose", "rows": rows}
