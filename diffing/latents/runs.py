"""Run folders and the caches that belong to them."""

from pathlib import Path

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.training.checkpoint import RunRecord
from crosscoders.training.feed import require_same_source


def open_run_and_cache(run: str, cache: str | None) -> tuple[Path, ActivationCache]:
    """Return a run folder and a cache of the same pair; default: the one that the run was trained on.

    Raises:
        InputError: `run` is no folder, its cache is unknown, or the cache is of another pair.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"{run!r} is not a folder; the results are written into it. Name a run folder.")
    opened = ActivationCache(cache if cache is not None else training_cache(folder))
    require_same_source(folder, opened)
    return folder, opened


def training_cache(run: Path) -> str:
    """Return the path of the cache that a run was trained on.

    Raises:
        InputError: it is no run folder, or there was no cache.
    """
    if not (run / "run.json").is_file():
        raise InputError(
            f"{str(run)!r} is not a run folder (no run.json), so its cache is unknown. Name it: --cache CACHE"
        )
    inputs = files.read_model(run / "run.json", RunRecord)["inputs"]
    if (inputs.get("cache") or {}).get("path") is None:
        raise InputError(f"{str(run)!r} was not trained on a cache. Name one: --cache CACHE")
    return str(inputs["cache"]["path"])
