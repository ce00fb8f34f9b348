"""What the commands of `diffing` do, each as one function of its settings that returns a JSON object."""

import shlex
import time
from pathlib import Path
from typing import Any

from crosscoders import store
from crosscoders.cache import ActivationCache
from crosscoders.commands import closing, require_same_source, result
from crosscoders.config import to_dict
from crosscoders.errors import InputError
from crosscoders.formats import load_crosscoder
from crosscoders.progress import say
from crosscoders.reporting import row
from diffing.causal import inspect_cached, load_whole, measure_run
from diffing.causal_sets import checked
from diffing.causal_summary import rows, summary
from diffing.cli import (
    CausalSettings,
    DemoSettings,
    LensSettings,
    ReportSettings,
    ScaleSettings,
    StabilitySettings,
    SteerSettings,
)
from diffing.latent_scaling import MODELS
from diffing.lens import logit_lens
from diffing.null.settings import NullSettings
from diffing.report import write_report
from diffing.report.nulls import NULL, counts_beside, read_nulls
from diffing.sae_gap.settings import SaeGapSettings
from diffing.stability import read_runs
from diffing.stability import stability as survival_rows
from diffing.steering import answer, steered, steering_vector
from diffing.table import read_table, scale_run
from diffing.verdict import VERDICTS


def scale(settings: ScaleSettings) -> dict[str, Any]:
    """`diffing scale`"""
    started = time.perf_counter()
    run, cache = _opened(settings.run, settings.cache)
    say(f"scale {run} on {min(settings.n_tokens or len(cache), len(cache)):,} tokens of {cache.path}")
    table = scale_run(run, cache, n_tokens=settings.n_tokens, n_examples=settings.n_examples, device=settings.device)
    counts = {verdict: int((table["verdict"] == verdict).sum()) for verdict in VERDICTS}
    nulls = read_nulls(run)
    beside = {verdict: f" (on nulls: {text})" for verdict, text in counts_beside(nulls).items()}
    words = [f"{verdict} {n}{beside.get(verdict, '')}" for verdict, n in counts.items() if n]
    say(f"{'  '.join(words)}  of {len(table):,} latents")
    if not nulls:
        say(f"these counts have no false-positive rate yet: {NULL.format(run=run)}")
    twins = store.read_object(run / "twins.json", "twins", "control")
    if twins["twins"]:
        say(f"{len(twins['twins'])} pairs of twins, a tuned-only and a base-only latent of one direction: twins.json")
    closing(started, f"latent table in {run / 'latents.json'}")
    say(f"next: diffing report {shlex.quote(str(run))}")
    found = [row(f"scale.verdict.{verdict}.count", n, "latents", len(table)) for verdict, n in counts.items()]
    found.append(row("scale.twins.count", len(twins["twins"]), "pairs", len(table)))
    for name in ("twins", "control"):
        apart = [pair["divergence"] for pair in twins[name]]
        if apart:
            found.append(row(f"scale.{name}.divergence", sum(apart) / len(apart), "fraction", len(apart)))
    return result("scale", to_dict(settings), found)


def causal(settings: CausalSettings) -> dict[str, Any]:
    """`diffing causal`"""
    started = time.perf_counter()
    run, cache = _opened(settings.run, settings.cache)
    say(f"causal {run} at {cache.manifest['hook_point']} of the models of {cache.path}")
    measured = measure_run(run, cache, settings)
    found = rows(measured, first_tokens=settings.first_tokens, seed=settings.seed)
    described = {**result("causal", to_dict(settings), found), "latents": store.hash_file(run / "latents.json")}
    store.write_json(run / "causal.json", described)
    closing(started, f"{len(found)} rows in {run / 'causal.json'}")
    return described | {"text": summary(found, settings.first_tokens)}


def steer(settings: SteerSettings) -> dict[str, Any]:
    """`diffing steer`"""
    run, cache = _opened(settings.run, settings.cache)
    hook_point = cache.manifest["hook_point"]
    table, crosscoder = read_table(run), load_crosscoder(run)
    (latent,) = checked([settings.latent], len(table))
    largest = float(table["max_activation"][latent])
    pair = load_whole(inspect_cached(cache), hook_point, settings.device, settings.model_dtype)
    model, side = pair.models[MODELS.index(settings.model)], MODELS.index(settings.decoder)
    answers = []
    lines = [f"{settings.decoder} decoder of latent {latent} in the {settings.model} model; strength: answer"]
    for strength in settings.strengths:
        vector = steering_vector(crosscoder, latent, side=side, activation=strength * largest)
        with steered(model, hook_point, vector):
            text = answer(model, pair.info.tokenizer, settings.prompt, max_new_tokens=settings.max_new_tokens)
        answers.append({"strength": strength, "answer": text})
        lines.append(f"{strength:>6g}: {text!r}")
    return result("steer", to_dict(settings), []) | {"answers": answers, "text": "\n".join(lines)}


def lens(settings: LensSettings) -> dict[str, Any]:
    """`diffing lens`"""
    run, cache = _opened(settings.run, settings.cache)
    table, crosscoder = read_table(run), load_crosscoder(run)
    chosen = table.nsmallest(32, "rank").index.tolist() if settings.latents is None else settings.latents
    latents = list(checked(chosen, len(table)))
    pair = load_whole(inspect_cached(cache), cache.manifest["hook_point"], settings.device, settings.model_dtype)
    found = logit_lens(crosscoder, pair, latents, n_tokens=settings.top)
    lines = [f"{j:>6}  {name:<6}{' '.join(map(repr, tokens))}" for j in found for name, tokens in found[j].items()]
    described = result("lens", to_dict(settings), []) | {"latents": found}
    store.write_json(run / "lens.json", described)
    return described | {"text": "\n".join(lines)}


def stability(settings: StabilitySettings) -> dict[str, Any]:
    """`diffing stability`"""
    found = survival_rows(read_runs(settings.runs), seed=settings.seed)
    lines = [f"{entry['name']:<44}{entry['value']:>8.1%}  n {entry['n']:,}" for entry in found]
    return result("stability", to_dict(settings), found) | {"text": "\n".join(lines)}


def _opened(run: str, cache: str | None) -> tuple[Path, ActivationCache]:
    """A run folder and a cache of the same pair; default: the one that the run was trained on."""
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"{run!r} is not a folder; the results are written into it. Name a run folder.")
    opened = ActivationCache(cache if cache is not None else _trained_on(folder))
    require_same_source(folder, opened)
    return folder, opened


def _trained_on(run: Path) -> str:
    if not (run / "run.json").is_file():
        raise InputError(
            f"{str(run)!r} is not a run folder (no run.json), so its cache is unknown. Name it: --cache CACHE"
        )
    inputs = store.read_object(run / "run.json", "inputs")["inputs"]
    if "path" not in inputs.get("cache", {}):
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


def sae_gap(settings: SaeGapSettings) -> dict[str, Any]:
    """`diffing sae-gap`"""
    from diffing.sae_gap import command

    started = time.perf_counter()
    found = command.rows(command.gap_run(settings), settings.seed)
    described = result("sae-gap", to_dict(settings), found)
    store.write_json(Path(settings.out) / "sae-gap.json", described)
    closing(started, f"{len(found)} rows in {Path(settings.out) / 'sae-gap.json'}")
    return {**described, "text": command.summary(found)}


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
