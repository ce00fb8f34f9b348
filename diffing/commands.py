"""What the commands of `diffing` do, each as one function of its settings that returns a JSON object."""

import time
from pathlib import Path
from typing import Any

from crosscoders import store
from crosscoders.cache import ActivationCache
from crosscoders.commands import closing, require_same_source, result
from crosscoders.config import to_dict
from crosscoders.errors import InputError
from crosscoders.progress import say
from crosscoders.reporting import row
from diffing.cli import DemoSettings, ReportSettings, ScaleSettings
from diffing.null.settings import NullSettings
from diffing.report import write_report
from diffing.report.nulls import NULL, counts_beside, read_nulls
from diffing.table import scale_run
from diffing.verdict import VERDICTS


def scale(settings: ScaleSettings) -> dict[str, Any]:
    """`diffing scale`"""
    started = time.perf_counter()
    run = Path(settings.run)
    if not run.is_dir():
        raise InputError(f"{settings.run!r} is not a folder; the results are written into it. Name a run folder.")
    cache = ActivationCache(settings.cache if settings.cache is not None else _trained_on(run))
    require_same_source(run, cache)
    say(f"scale {run} on {min(settings.n_tokens or len(cache), len(cache)):,} tokens of {cache.path}")
    table = scale_run(run, cache, n_tokens=settings.n_tokens, n_examples=settings.n_examples, device=settings.device)
    counts = {verdict: int((table["verdict"] == verdict).sum()) for verdict in VERDICTS}
    nulls = read_nulls(run)
    beside = {verdict: f" (on nulls: {text})" for verdict, text in counts_beside(nulls).items()}
    words = [f"{verdict} {n}{beside.get(verdict, '')}" for verdict, n in counts.items() if n]
    say(f"{'  '.join(words)}  of {len(table):,} latents")
    closing(started, f"latent table in {run / 'latents.json'}")
    if not nulls:
        say(f"these counts have no false-positive rate yet: {NULL.format(run=run)}")
    say(f"next: diffing report {run}")
    rows = [row(f"scale.verdict.{verdict}.count", n, "latents", len(table)) for verdict, n in counts.items()]
    return result("scale", to_dict(settings), rows)


def _trained_on(run: Path) -> str:
    if not (run / "run.json").is_file():
        raise InputError(
            f"{str(run)!r} is not a run folder (no run.json), so its cache is unknown. Name it: --cache CACHE"
        )
    inputs = store.read_object(run / "run.json", "inputs")["inputs"]
    if "cache" not in inputs:
        raise InputError(f"{str(run)!r} was not trained on a cache. Name one: --cache CACHE")
    return str(inputs["cache"]["path"])


def report(settings: ReportSettings) -> dict[str, Any]:
    """`diffing report`"""
    files = write_report(Path(settings.run))
    say(f"report: {files.html} ({store.size_text(files.html.stat().st_size)}), {files.json}")
    found: dict[str, Any] = store.read_json(files.json)
    return found


def demo(settings: DemoSettings) -> dict[str, Any]:
    """`diffing demo`"""
    from diffing.demo.run import run_demo

    return run_demo(settings)


def null(settings: NullSettings) -> dict[str, Any]:
    """`diffing null`"""
    from diffing.null.command import calibrate_run, result_rows, summary

    started = time.perf_counter()
    run = Path(settings.run)
    cache = ActivationCache(settings.cache if settings.cache is not None else _trained_on(run))
    require_same_source(run, cache)
    found = calibrate_run(settings, cache)
    closing(started, f"calibration in {run / 'null.json'}")
    say(f"next: diffing report {run}")
    return result("null", to_dict(settings), result_rows(found)) | {"text": summary(found)}
