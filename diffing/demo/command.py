"""`diffing demo`: the whole path on the embedded pair, with the same functions that the commands use.

documents -> two caches (train, held-out) -> crosscoder (preset `demo`) -> latent table -> report. Every step is skipped
where its result is already there, so a second run only makes the report again.
"""

import time
from pathlib import Path
from typing import Any

import pandas

from crosscoders import (
    ActivationCache,
    CacheConfig,
    CrosscoderConfig,
    TrainConfig,
    cache_activations,
    cached_stream,
    train,
)
from crosscoders.common import files, results
from crosscoders.common.checks import to_dict
from crosscoders.common.progress import about, say
from crosscoders.common.provenance import peak_memory_gib
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord, legend, row
from crosscoders.text.settings import DataSource
from crosscoders.training.feed import EVAL_TOKENS, cache_inputs
from crosscoders.training.settings import PRESETS
from diffing.demo import document_file, model_folder
from diffing.demo.settings import DemoSettings
from diffing.latents.table import scale_run
from diffing.null.pipeline import calibrate_run
from diffing.null.settings import NullSettings
from diffing.null.summary import null_summary, result_rows
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
    with about("held out"):
        heldout = cache_activations(cache_config(out / "cache-heldout", "heldout", HELDOUT_TOKENS, settings.seed))
    run = out / "run"
    config = train_config(settings.seed)
    train_on(train_cache, heldout, config, run)
    rows = files.read_model(run / "eval.json", ResultRecord)["rows"]
    rows.append(row("train.tokens", config.n_tokens, "tokens", config.n_tokens))
    if not (run / "latents.json").is_file():
        say(f"scale {len(train_cache):,} tokens")
        scale_run(run, train_cache)
    table = pandas.read_parquet(run / "latents.parquet")
    nulls = calibrate_demo(out, run, train_cache, settings.null_seeds) if settings.null_seeds else ("", [])
    written = write_report(run)
    text = demo_summary(table, files.read_model(run / "examples.json", Record)["latents"])
    text += nulls[0] + "\n" + closing_words(written.html, rows, time.perf_counter() - started)
    return results.result("demo", to_dict(settings), [*rows, *demo_rows(table), *nulls[1]]) | {"text": text}


def calibrate_demo(out: Path, run: Path, cache: ActivationCache, n_seeds: int) -> tuple[str, list[dict[str, Any]]]:
    """Run `diffing null` on the embedded null models and a rounded base; return its text and its rows."""
    settings = NullSettings(
        run=str(run),
        out=str(out / "null"),
        placebo=str(model_folder("placebo")),
        format_only=str(model_folder("format_only")),
        rounded_bits=8,
        n_seeds=n_seeds,
    )
    calibration = calibrate_run(settings, cache)
    return "\n" + null_summary(calibration), result_rows(calibration)


def cache_config(out: Path, split: str, n_tokens: int, seed: int) -> CacheConfig:
    """Return the settings of a cache of raw text and dialogues, half of the tokens each."""
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


def train_config(seed: int) -> TrainConfig:
    """Return the preset `demo`."""
    preset = PRESETS["demo"]
    shape = {name.split(".")[1]: value for name, value in preset.items() if "." in name}
    others = {name: value for name, value in preset.items() if "." not in name}
    return TrainConfig(crosscoder=CrosscoderConfig(**shape), **others, seed=seed)


def train_on(cache: ActivationCache, heldout: ActivationCache | None, config: TrainConfig, out: Path) -> None:
    """Train a crosscoder on a cache and evaluate it on another, in `out`; a run that is finished stays as it is."""
    stream = cached_stream(cache, batch_size=config.batch_size, buffer_tokens=config.buffer_tokens, seed=config.seed)
    inputs = cache_inputs(cache)
    if heldout is None:
        train(config, stream, out, inputs=inputs)
        return
    inputs |= {"eval_cache": {"hash": heldout.manifest_hash}}
    train(config, stream, out, holdout=lambda: (t.activations for t in heldout.batches(EVAL_TOKENS)), inputs=inputs)


OVER_SEEDS = (
    "",
    "Over crosscoder seeds this moves: which latents these are (24 to 32% of the first 32",
    "come back in another seed) and their order, how many of them are tuned-leaning (12 to",
    "14 of 1,024), how many each concept has, and the KL that 32 of them close (26 to 48%).",
    "This does not: held-out FVE (.966 to .967, .956 to .957), L0 (24.0), that no latent is",
    "tuned-only, and that each planted concept has a latent among the first 32.",
)
"""What a stranger should not read into one run of the demo; figures and dates are in docs/log.md."""


def demo_rows(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return the counts behind the summary."""
    first = table.nsmallest(32, "rank")
    rows = [
        row("demo.norm_class.tuned-only.count", int((table["norm_class"] == "tuned-only").sum()), "latents", len(table))
    ]
    for context in PLANTED:
        rows.append(row(f"demo.top_32.{context}", int((first["main_context"] == context).sum()), "latents", len(first)))
    return rows


def demo_summary(table: pandas.DataFrame, examples: dict[str, list[dict[str, Any]]]) -> str:
    """Say which are the ten most specific latents and the first of each planted concept, with one context each, and
    their class."""
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
        latents = first.index[first["main_context"] == context]
        if len(latents):
            lines.append(latent_line(first, int(latents[0]), examples))
    meanings = {
        "rank": "place in the order of verdict, then evidence", "latent": "its number",
        "nu_error": "near 1: hidden by the penalty", "nu_rec.": "near 1: other latents carry it in the base",
        "cosine": "of its two decoders", "norm": "relative decoder norm, 0 base, .5 both, 1 tuned",
        "share of its activation": "in its main context", "where it fires most (>>token<<)": "its strongest example",
    }  # fmt: skip
    lines += ["", *legend(header, meanings)]
    n_only = int((table["norm_class"] == "tuned-only").sum())
    if n_only == 0:
        lines += [
            "",
            "No latent is tuned-only in the published sense (relative decoder norm of 0.9 or more): both models keep",
            "a code for every latent. New concepts have unrelated directions (cosine near 0), and the base model lacks",
            "the tuned one (both ratios near 0): tuned-leaning, a weak verdict, from a norm of 0.7 on, else rotated.",
        ]
    else:
        sense = "in the published sense (relative decoder norm of 0.9 or more)"
        lines += ["", f"{n_only} of {len(table)} latents are tuned-only {sense}."]
    return "\n".join([*lines, *OVER_SEEDS])


def latent_line(table: pandas.DataFrame, latent: int, examples: dict[str, list[dict[str, Any]]]) -> str:
    """Write one latent on one line."""
    values = table.loc[latent]
    ratios = f"{values['nu_error']:>8.2f}  {values['nu_reconstruction']:>7.2f}"
    geometry = f"{values['decoder_cosine']:>6.2f}  {values['relative_decoder_norm']:.2f}"
    where = f"{values['main_context_share']:.0%} {values['main_context']}"
    text = context_text(examples.get(str(latent), []))
    return f"  {values['rank']:>4}  {latent:>6}  {ratios}  {geometry}   {where:<24}  {text}"


def context_text(examples: list[dict[str, Any]]) -> str:
    """Write the strongest example on one line, its peak marked."""
    if not examples:
        return ""
    best = examples[0]
    tokens = [token.replace("\n", "\u21b5") for token in best["tokens"]]
    peak, end = best["peak"], best["peak"] + 1
    while peak and not tokens[peak]:  # the tokens of one character are marked together
        peak -= 1
    while end < len(tokens) and not tokens[end]:
        end += 1
    return f"{''.join(tokens[max(0, peak - 8) : peak])}>>{tokens[peak]}<<{''.join(tokens[end : end + 3])}".strip()


def closing_words(html: Path, rows: list[dict[str, Any]], seconds: float) -> str:
    """Say the quality with its count, time, memory, where the report is, the explorer, and the path on another pair."""
    value = {entry["name"]: entry for entry in rows}
    n = value["eval.l0"]["n"]
    return f"""
held-out FVE base {value["eval.fve.base"]["value"]:.3f}, tuned {value["eval.fve.tuned"]["value"]:.3f}, \
L0 {value["eval.l0"]["value"]:.1f} latents/token
({n:,} tokens of documents that neither the models nor the crosscoder were trained on)
took {seconds:.0f} s, peak memory {peak_memory_gib():.2f} GiB
report: {html.resolve()}
both models live, in your browser: diffing explore {html.parent}

Next, on your own pair (Gemma-2-2B needs a GPU, its licence accepted on the hub, and 9.2 GB of disk a million tokens):
  crosscoders cache --base google/gemma-2-2b --tuned google/gemma-2-2b-it --hook-point blocks.13.hook_resid_post \\
    --data '["chats.jsonl", "text.jsonl"]' --n-tokens 10000000 --out runs/gemma/cache
  crosscoders train --preset paper-batchtopk --cache runs/gemma/cache --holdout-tokens 500000 --out runs/gemma/run
  diffing scale runs/gemma/run && diffing report runs/gemma/run"""


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Run `diffing demo`."""
    return run_demo(settings)
