r"""Parameter decomposition where the answer is known: toy models of superposition and planted changes of weights.

A row is a mean over seeds, low and high its 95% interval (Student's t over seeds, null for one), n the seeds.
`planted`: six behaviours in one matrix, to be told apart by when they matter alone. `new-features`: a toy model that
learned more features. Controls: a change without effect, and one that every input needs. `quick`: one seed, no
identity, no new features.
"""

from typing import Any

from benchmarks.decompose.runs import RUNS
from benchmarks.planted import over_seeds
from crosscoders.common.progress import say

SEEDS = range(3)
QUICK = ("planted", "no-effect", "tms-5-2")


def run(quick: bool) -> dict[str, Any]:
    """Return rows `decompose.<toy>.*`."""
    rows: list[dict[str, Any]] = []
    for name, measure in RUNS.items():
        if quick and name not in QUICK:
            continue
        values = []
        for seed in SEEDS[: 1 if quick else None]:
            say(f"decompose {name}, seed {seed}")
            values.append(measure(seed))
        rows += over_seeds(f"decompose.{name}", values)
    return {"name": "decompose", "rows": rows}
