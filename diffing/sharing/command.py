"""`diffing export` and `push`, as functions of their settings that return a JSON object."""

import time
from pathlib import Path
from typing import Any

from crosscoders.common.checks import to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.progress import say
from crosscoders.common.results import result, row, say_closing
from crosscoders.formats.load import load_crosscoder
from diffing.causal.patching import inspect_cached, load_whole
from diffing.explorer.pages import read_evidence
from diffing.latents.runs import open_run_and_cache
from diffing.latents.table import require_fit
from diffing.sharing.neuronpedia import write_neuronpedia
from diffing.sharing.pushing import push_to_hub, write_repository
from diffing.sharing.settings import ExportSettings, PushSettings
from diffing.sharing.tables import read_tables, write_tables


def export(settings: ExportSettings) -> dict[str, Any]:
    """Run `diffing export`."""
    started = time.perf_counter()
    rows, lines = [], []
    for kind, folder in (("csv", settings.csv), ("parquet", settings.parquet)):
        if folder is not None:
            tables = read_tables(Path(settings.run))
            paths = write_tables(tables, Path(folder), kind)
            rows.append(row(f"export.{kind}", len(paths), "tables", sum(map(len, tables.values()))))
            lines.append(f"{len(paths)} tables in {folder}: {', '.join(tables)}")
    if settings.neuronpedia is not None:
        n_features, places = _neuronpedia(settings, Path(settings.neuronpedia))
        rows.append(row("export.neuronpedia", len(places), "sources", n_features))
        lines += [f"{n_features} features of {place}" for place in places]
    say_closing(started, settings.run)
    return result("export", to_dict(settings), rows) | {"text": "\n".join(lines)}


def push(settings: PushSettings) -> dict[str, Any]:
    """Run `diffing push`."""
    if settings.out is not None:
        write_repository(settings.run, settings.repo, Path(settings.out))
        address = settings.out
    else:
        address = push_to_hub(settings.run, settings.repo, private=not settings.public)
    return result("push", to_dict(settings), []) | {"address": address, "text": address}


def _neuronpedia(settings: ExportSettings, folder: Path) -> tuple[int, list[Path]]:
    """Write the folder; return the number of features and the folder of each source."""
    run, cache = open_run_and_cache(settings.run, settings.cache)
    evidence = read_evidence(run)
    crosscoder = load_crosscoder(run, device=str(choose_device(settings.device)))
    require_fit(crosscoder, cache)
    say(f"export {run}: {len(evidence.run.latents)} latents, {len(evidence.run.examples)} of them with examples")
    pair = load_whole(inspect_cached(cache), cache.manifest["hook_point"], settings.device, settings.model_dtype)
    sources = write_neuronpedia(
        folder, evidence, crosscoder, cache, pair, source_set=settings.source_set, creator=settings.creator
    )
    return len(evidence.run.latents), [folder / source.model / source.name for source in sources]
