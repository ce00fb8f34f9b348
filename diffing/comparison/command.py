"""`diffing compare`, as a function of its settings that returns a JSON object.

Order: everything that can be wrong; for each seed the null, then the tuned model, unit by unit; means and verdicts;
OUT/compare.json, and the table for people.
"""

import time
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.progress import about
from crosscoders.common.results import result, say_closing
from diffing.comparison.inputs import Inputs, inspect, model_hashes
from diffing.comparison.judgement import Rows, over_seeds, verdict_rows
from diffing.comparison.settings import (
    DIRECTIONS,
    SCORES,
    TEXTS,
    TRAINED_DIRECTIONS,
    TRAINED_SCORES,
    CompareSettings,
)
from diffing.comparison.table import compare_table
from diffing.comparison.units import Reader, run_unit, units_of

FORMAT_VERSION = 1


def compare(settings: CompareSettings) -> dict[str, Any]:
    """Run `diffing compare`."""
    started, out = time.perf_counter(), Path(settings.out)
    inputs = inspect(settings)
    with files.exclusive(out):
        seeds, texts = run_seeds(inputs)
    behaviours = [behaviour.name for behaviour in inputs.truth]
    verdicts = verdict_rows(blocks_of(settings), seeds["tuned"], seeds.get("null"), behaviours)
    rows = [
        entry | {"name": f"compare.{which}.{name}"}
        for which, of_model in seeds.items()
        for name, entry in over_seeds(of_model).items()
    ]
    rows += [entry | {"name": f"compare.tuned.{entry['name']}"} for entry in verdicts]
    described = result("compare", to_dict(settings), rows) | {
        "format": "diffing-compare",
        "format_version": FORMAT_VERSION,
        "models": model_hashes(inputs),
        "hook_point": inputs.hook_point,
        "behaviours": behaviours,
        "n_seeds": settings.n_seeds,
        "texts": texts,
    }
    files.write_json(out / "compare.json", described)
    say_closing(started, f"{len(rows)} rows in {out / 'compare.json'}")
    return described | {"text": compare_table(described)}


def run_seeds(inputs: Inputs) -> tuple[dict[str, list[Rows]], dict[str, dict[str, Any]]]:
    """Return rows by model and seed, and the texts of the first seed by model and method."""
    settings, units = inputs.settings, units_of(inputs)
    seeds: dict[str, list[Rows]] = {which: [] for which in ("tuned", "null") if which in inputs.infos}
    texts: dict[str, dict[str, Any]] = {which: {} for which in seeds}
    for seed in range(settings.seed, settings.seed + settings.n_seeds):
        documents = inputs.documents(seed)
        null = Reader(inputs, "null", seed, documents, None) if "null" in seeds else None
        readers = [null] if null is not None else []
        for reader in [*readers, Reader(inputs, "tuned", seed, documents, null)]:
            parts = {}
            for unit, methods in units.items():
                with about(f"{unit}, {reader.which}, seed {seed}"):
                    parts[unit] = run_unit(reader, unit, methods)
            entries = [entry for part in parts.values() for entry in part["rows"]]
            seeds[reader.which].append({entry["name"]: entry for entry in entries})
            if seed == settings.seed:
                texts[reader.which] = {unit: part["texts"] for unit, part in parts.items() if part["texts"]}
    return seeds, texts


def blocks_of(settings: CompareSettings) -> dict[str, str]:
    """Return the block of every chosen method, in the order of the table."""
    named = {
        "directions": (*DIRECTIONS, *TRAINED_DIRECTIONS), "scores": (*SCORES, *TRAINED_SCORES), "texts": TEXTS,
    }  # fmt: skip
    return {method: block for block, methods in named.items() for method in settings.chosen(methods)}
