"""`diffing demo`: the whole path on the embedded pair, with the same functions that the commands use.

documents -> two caches (train, held-out) -> crosscoder (preset `demo`) -> latent table -> report. Every step is skipped
where its result is already there, so a second run only makes the report again.
"""

import time
from pathlib import Path
from typing import Any

import pandas

from crosscoders.activations.cache import ActivationCache
from crosscoders.activations.caching import cache_activations
from crosscoders.activations.settings import CacheConfig
from crosscoders.common import files, results
from crosscoders.common.checks import to_dict
from crosscoders.common.command_line import parse
from crosscoders.common.progress import say
from crosscoders.common.provenance import peak_memory_gib
from crosscoders.common.records import Record
from crosscoders.common.results import row
from crosscoders.text.settings import DataSource
from crosscoders.training import command
from crosscoders.training.settings import TrainSettings
from diffing.demo import document_file, model_folder
from diffing.demo.settings import DemoSettings
from diffing.latents.table import scale_run
from diffing.null.settings import NullSettings
from diffing.report.publishing import write_report

HOOK_POINT = "blocks.2.hook_resid_post"
HELDOUT_TOKENS = 24_000
PLANTED = ("refusal", "identity", "gap", "template")
"""Contexts that the fine-tune made: three behaviours, and the chat template itself."""


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run all steps, print the ten most specific latents, return the rows of `--json`."""
    started = time.perf_counter()
    out = Path(settings.out)
    say("diffing demo: what did the fine-tune change in the embedded pair? (two Gemma-2 models of 1 M parameters)")
    train_cache = cache_activations(cache_config(out / "cache", "train", settings.n_tokens, settings.seed))
    heldout = cache_activations(cache_config(out / "cache-heldout", "heldout", HELDOUT_TOKENS, settings.seed))
    run = out / "run"
    found = command.train_run(train_settings(run, train_cache, heldout, settings.seed))
    if not (run / "latents.json").is_file():
        say(f"scale {len(train_cache):,} tokens")
        scale_run(run, train_cache)
    table = pandas.read_parquet(run / "latents.parquet")
    nulls = calibrate_demo(out, run, train_cache, settings.null_seeds) if settings.null_seeds else ("", [])
    written = write_report(run)
    text = summary(table, files.read_model(run / "examples.json", Record)["latents"])
    text += nulls[0] + "\n" + closing_words(written.html, found["rows"], time.perf_counter() - started)
    return results.result("demo", to_dict(settings), [*found["rows"], *demo_rows(table), *nulls[1]]) | {"text": text}


def calibrate_demo(out: Path, run: Path, cache: ActivationCache, n_seeds: int) -> tuple[str, list[dict[str, Any]]]:
    """`diffing null` on the embedded null models and a rounded base: its text and its rows."""
    from diffing.null import command

    settings = NullSettings(
        run=str(run),
        out=str(out / "null"),
        placebo=str(model_folder("placebo")),
        format_only=str(model_folder("format_only")),
        rounded_bits=8,
        n_seeds=n_seeds,
    )
    found = command.calibrate_run(settings, cache)
    return "\n" + command.summary(found), command.result_rows(found)


def cache_config(out: Path, split: str, n_tokens: int, seed: int) -> CacheConfig:
    """Raw text and dialogues, half of the tokens each."""
    return CacheConfig(
        base=str(model_folder("base")),
        tuned=str(model_folder("tuned")),
        hook_point=HOOK_POINT,
        data=[DataSource(path=str(document_file(f"{kind}_{split}"))) for kind in ("raw", "dialogues")],
        out=str(out),
        n_tokens=n_tokens,
        context_length=128,
        batch_rows=32,
        seed=seed,
    )


def train_settings(run: Path, cache: ActivationCache, heldout: ActivationCache, seed: int) -> TrainSettings:
    """The preset `demo`, as `crosscoders train --preset demo` would take it."""
    from crosscoders.cli import COMMANDS

    command = next(command for command in COMMANDS if command.name == "train")
    argv = ["--preset", "demo", "--cache", str(cache.path), "--eval_cache", str(heldout.path), "--out", str(run)]
    settings: TrainSettings = parse("crosscoders", command, [*argv, "--seed", str(seed)]).settings
    return settings


def demo_rows(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Counts behind the summary."""
    first = table.nsmallest(32, "rank")
    rows = [
        row("demo.norm_class.tuned-only.count", int((table["norm_class"] == "tuned-only").sum()), "latents", len(table))
    ]
    for context in PLANTED:
        rows.append(row(f"demo.top_32.{context}", int((first["main_context"] == context).sum()), "latents", len(first)))
    return rows


def summary(table: pandas.DataFrame, examples: dict[str, list[dict[str, Any]]]) -> str:
    """The ten most specific latents and the first of each planted concept, with one context each, and their class."""
    header = (
        "  rank  latent  nu_error  nu_rec.  cosine  norm   share of its activation   where it fires most (>>token<<)"
    )
    lines = ["", "The ten latents that are most specific to the tuned model:", header]
    first = table.nsmallest(32, "rank")
    lines += [latent_line(first, int(latent), examples) for latent in first.index[:10]]
    counts = ", ".join(f"{context} {n}" for context, n in first["main_context"].value_counts().items())
    lines += [
        "",
        f"Main contexts of the first 32: {counts}.",
        "The first latent of each concept that the fine-tune planted:",
    ]
    lines.append(header)
    for context in PLANTED:
        found = first.index[first["main_context"] == context]
        if len(found):
            lines.append(latent_line(first, int(found[0]), examples))
    n_only = int((table["norm_class"] == "tuned-only").sum())
    if n_only == 0:
        lines += [
            "",
            "No latent is tuned-only in the published sense (relative decoder norm of 0.9 or more): both models keep",
            "a code for every latent. New concepts have unrelated directions (cosine near 0), and the base model lacks",
            "the tuned one (both ratios near 0): tuned-specific from a norm of 0.7 on, else rotated.",
        ]
    else:
        sense = "in the published sense (relative decoder norm of 0.9 or more)"
        lines += ["", f"{n_only} of {len(table)} latents are tuned-only {sense}."]
    return "\n".join(lines)


def latent_line(table: pandas.DataFrame, latent: int, examples: dict[str, list[dict[str, Any]]]) -> str:
    """One latent on one line."""
    values = table.loc[latent]
    ratios = f"{values['nu_error']:>8.2f}  {values['nu_reconstruction']:>7.2f}"
    geometry = f"{values['decoder_cosine']:>6.2f}  {values['relative_decoder_norm']:.2f}"
    where = f"{values['main_context_share']:.0%} {values['main_context']}"
    text = context_text(examples.get(str(latent), []))
    return f"  {values['rank']:>4}  {latent:>6}  {ratios}  {geometry}   {where:<24}  {text}"


def context_text(found: list[dict[str, Any]]) -> str:
    """The strongest example on one line, its peak marked."""
    if not found:
        return ""
    best = found[0]
    tokens = [token.replace("\n", "\u21b5") for token in best["tokens"]]
    peak = best["peak"]
    return f"{''.join(tokens[max(0, peak - 8) : peak])}>>{tokens[peak]}<<{''.join(tokens[peak + 1 : peak + 4])}".strip()


def closing_words(html: Path, rows: list[dict[str, Any]], seconds: float) -> str:
    """Quality with its count, time, memory, where the report is, and the same path on the user's own pair."""
    value = {entry["name"]: entry for entry in rows}
    n = value["eval.l0"]["n"]
    return f"""
held-out FVE base {value["eval.fve.base"]["value"]:.3f}, tuned {value["eval.fve.tuned"]["value"]:.3f}, \
L0 {value["eval.l0"]["value"]:.1f} latents/token
({n:,} tokens of documents that neither the models nor the crosscoder were trained on)
took {seconds:.0f} s, peak memory {peak_memory_gib():.2f} GiB
report: {html.resolve()}

Next, on your own pair (Gemma-2-2B needs a GPU, its licence accepted on the hub, and 9.2 GB of disk a million tokens):
  crosscoders cache --base google/gemma-2-2b --tuned google/gemma-2-2b-it --hook-point blocks.13.hook_resid_post \\
    --data '["chats.jsonl", "text.jsonl"]' --n-tokens 10000000 --out runs/gemma/cache
  crosscoders train --preset paper-batchtopk --cache runs/gemma/cache --holdout-tokens 500000 --out runs/gemma/run
  diffing scale runs/gemma/run && diffing report runs/gemma/run"""


def demo(settings: DemoSettings) -> dict[str, Any]:
    """`diffing demo`"""
    return run_demo(settings)
