"""`diffing null`: make or take the null models, run the pipeline on each, and write RUN/null.json.

Reading order: `calibrate_run` is the whole command; `null_models` says which nulls there are, `summary` is what it
prints, `result_rows` what `--json` holds. Everything that is finished in OUT is used again:

    OUT/<null>/model/       made by the command: rounded, or a placebo trained here
    OUT/<null>/cache/       the tokens of the run's cache, base and null model
    OUT/<null>/seed-<n>/    crosscoder and latents.json; OUT/tuned/seed-<n>/ for the pair itself
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.common.results import result, row, say_closing
from crosscoders.models.names import hash_model
from crosscoders.training.feed import require_same_source
from diffing.latents.runs import _trained_on
from diffing.latents.table import LatentRecord
from diffing.null.calibration import Tables, calibrate
from diffing.null.models import round_model, train_placebo
from diffing.null.rates import SCORES
from diffing.null.runs import null_cache, null_run, read_config, read_scaled, require_null
from diffing.null.settings import NullSettings

FORMAT_VERSION = 1


def calibrate_run(settings: NullSettings, opened: ActivationCache) -> dict[str, Any]:
    """Calibrate the counts of a scaled run on the nulls that `settings` names, write RUN/null.json, return it.

    Raises:
        InputError: the run was not scaled on this cache, or a null does not fit the pair.
    """
    run, out = Path(settings.run), Path(settings.out)
    config = read_config(run, settings.device)
    n_tokens = require_scaled_on(run, opened)
    base = str(opened.manifest["config"]["base"])
    for model in (settings.placebo, settings.format_only):
        if model is not None:
            require_null(base, model, opened)
    models = null_models(settings, opened, config.seed)
    caches = {kind: null_cache(opened, model, out / kind / "cache", settings.device) for kind, model in models.items()}
    tables: Tables = {"tuned": {config.seed: read_scaled(run)}, **{kind: {} for kind in models}}
    for seed in range(config.seed, config.seed + settings.n_seeds):
        for kind, cache in {**caches, "tuned": opened}.items():
            # A rounded copy barely differs from the base: one crosscoder says whether any latent passes.
            if seed not in tables[kind] and not (kind == "rounded" and seed > config.seed):
                here = out / kind / f"seed-{seed}"
                tables[kind][seed] = null_run(replace(config, seed=seed), cache, here, n_tokens)
    found = {
        "format_version": FORMAT_VERSION,
        "latents": files.hash_file(run / "latents.json"),
        "n_tokens": n_tokens,
        "seed": config.seed,
        "nulls": {kind: {"name": model, "hash": hash_model(model)} for kind, model in models.items()},
        **calibrate(tables, settings.rates),
    }
    files.write_json(run / "null.json", found)
    return found


def require_scaled_on(run: Path, opened: ActivationCache) -> int:
    """The tokens that the run was scaled on; raises InputError unless they are the first ones of `opened`."""
    found = files.read_model(run / "latents.json", LatentRecord)
    if found["cache"]["hash"] != opened.manifest_hash:
        raise InputError(
            f"{run} was scaled on cache {found['cache']['path']!r}, not on {str(opened.path)!r}. Name that one with "
            "--cache, or run diffing scale again."
        )
    return int(found["n_tokens"])


def null_models(settings: NullSettings, opened: ActivationCache, seed: int) -> dict[str, str]:
    """The model of each null that is asked for, made where that is needed."""
    config = opened.manifest["config"]
    found: dict[str, str] = {}
    if settings.placebo is not None:
        found["placebo"] = settings.placebo
    if settings.train_placebo is not None:
        folder = Path(settings.out) / "placebo" / "model"
        found["placebo"] = str(train_placebo(config["base"], folder, settings, config["context_length"], seed))
    if settings.format_only is not None:
        found["format_only"] = settings.format_only
    if settings.rounded_bits is not None:
        folder = Path(settings.out) / "rounded" / "model"
        found["rounded"] = str(round_model(config["base"], folder, settings.rounded_bits))
    return found


# --------------------------------------------------------------------------------------------------------------- words


def summary(found: dict[str, Any]) -> str:
    """The thresholds of the main score and the fixed ones, with the counts of every seed."""
    main = next(iter(SCORES))
    lines = [
        "",
        f"Specific latents by {main}, the larger of |nu_error| and |nu_reconstruction|, among those with a relative",
        f"decoder norm from 0.5. A threshold is fixed on a null crosscoder of seed {found['seed']}; counts of other",
        "seeds stand in brackets, and the rate with its 95% interval is over those of the null. None: where a further",
        "null crosscoder has a tenth of a latent on average.",
    ]
    for entry in found["thresholds"]:
        if entry["score"] == main:
            at = "any" if entry["threshold"] is None else f"{entry['threshold']:.3f}"
            allowed = f"{entry['rate']:.1%}" if entry["rate"] else "none"
            lines.append(f"  {entry['null']} at {allowed}, threshold {at}:  {counts_text(entry['counts'])}")
            lines.append(f"      rate {rate_text(entry)}")
    lines += ["Thresholds that no null decided:"]
    lines += [f"  {entry['words']}:  {counts_text(entry['counts'])}" for entry in found["fixed"]]
    return "\n".join(lines)


def counts_text(counts: dict[str, list[dict[str, int]]]) -> str:
    """Counts by kind, other seeds in brackets."""
    parts = []
    for kind, entries in counts.items():
        first, *others = [str(entry["count"]) for entry in entries]
        parts.append(f"{kind} {first}" + (f" ({', '.join(others)})" if others else ""))
    return "  ".join(parts)


def rate_text(entry: dict[str, Any]) -> str:
    """A rate with its interval and count."""
    if entry["false_positive_rate"] is None:
        return "no alive latent"
    interval = f"{entry['low']:.2%} to {entry['high']:.2%}"
    n = f"{entry['n']:,} latents that count as {entry['n_effective']:,.0f}"
    return f"{entry['false_positive_rate']:.2%} ({interval}; {n})"


def result_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `--json`."""
    rows = []
    for entry in found["thresholds"]:
        name = f"null.{entry['null']}.{entry['score']}.{rate_name(entry['rate'])}"
        first = entry["counts"]["tuned"][0]
        rows.append(row(f"{name}.count", first["count"], "latents", first["n"]))
        rate = entry["false_positive_rate"]
        rows.append(row(f"{name}.false_positive_rate", rate, "fraction", entry["n"], entry["low"], entry["high"]))
    return rows


def rate_name(rate: float) -> str:
    """A rate as a part of a dotted name: `zero`, `percent_1`, `percent_0_5`."""
    return f"percent_{100 * rate:g}".replace(".", "_") if rate else "zero"


def null(settings: NullSettings) -> dict[str, Any]:
    """`diffing null`"""
    started = time.perf_counter()
    run = Path(settings.run)
    cache = ActivationCache(settings.cache if settings.cache is not None else _trained_on(run))
    require_same_source(run, cache)
    found = calibrate_run(settings, cache)
    say_closing(started, f"calibration in {run / 'null.json'}")
    say(f"next: diffing report {run}")
    return result("null", to_dict(settings), result_rows(found)) | {"text": summary(found)}
