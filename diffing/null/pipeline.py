"""A scaled run and its null models -> RUN/null.json.

Reading order: `calibrate_run` is the whole path; `require_scaled_on` checks the run, `null_models` says which nulls
there are. Everything that is finished in OUT is used again:

    OUT/<null>/model/       made here: rounded, or a placebo
    OUT/<null>/cache/       the tokens of the run's cache, base and null model
    OUT/<null>/seed-<n>/    crosscoder and latents.json; OUT/tuned/seed-<n>/ for the pair itself
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.progress import about
from crosscoders.models.names import hash_model
from diffing.latents.records import LatentRecord
from diffing.null.calibration import Tables, calibrate
from diffing.null.models import Placebo, round_model, train_placebo
from diffing.null.movement import weight_change
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
    caches = {}
    for kind, model in models.items():
        with about(kind):
            caches[kind] = null_cache(opened, model, out / kind / "cache", settings.device, force=settings.force)
    tables: Tables = {"tuned": {config.seed: read_scaled(run)}, **{kind: {} for kind in models}}
    for seed in range(config.seed, config.seed + settings.n_seeds):
        for kind, cache in {**caches, "tuned": opened}.items():
            # A rounded copy barely differs from the base: one crosscoder says whether any latent passes.
            if seed not in tables[kind] and not (kind == "rounded" and seed > config.seed):
                here, changed = out / kind / f"seed-{seed}", replace(config, seed=seed)
                with about(f"{kind}, seed {seed}"):
                    tables[kind][seed] = null_run(changed, cache, here, n_tokens, force=settings.force)
    calibration = {
        "format_version": FORMAT_VERSION,
        "latents": files.hash_file(run / "latents.json"),
        "n_tokens": n_tokens,
        "seed": config.seed,
        "nulls": {kind: {"name": model, "hash": hash_model(model)} for kind, model in models.items()},
        "weight_change": {
            kind: change_of(opened, model)
            for kind, model in {"tuned": str(opened.manifest["config"]["tuned"]), **models}.items()
        },
        **calibrate(tables, settings.rates),
    }
    files.write_json(run / "null.json", calibration)
    return calibration


def change_of(opened: ActivationCache, model: str) -> float:
    """Return how far a model's weights are from those of the base, as a share of their norm."""
    config = opened.manifest["config"]
    return weight_change(str(config["base"]), model, str(config["hook_point"]), config["tokenizer"])


def require_scaled_on(run: Path, opened: ActivationCache) -> int:
    """Return the tokens that the run was scaled on; raise InputError unless they are the first ones of `opened`."""
    scaled = files.read_model(run / "latents.json", LatentRecord)
    if scaled["cache"]["hash"] != opened.manifest_hash:
        raise InputError(
            f"{run} was scaled on cache {scaled['cache']['path']!r}, not on {str(opened.path)!r}. Name that one with "
            "--cache, or run diffing scale again."
        )
    return int(scaled["n_tokens"])


def null_models(settings: NullSettings, opened: ActivationCache, seed: int) -> dict[str, str]:
    """Return the model of each null that is asked for, made where that is needed."""
    config = opened.manifest["config"]
    models: dict[str, str] = {}
    if settings.placebo is not None:
        models["placebo"] = settings.placebo
    if settings.train_placebo is not None:
        folder = Path(settings.out) / "placebo" / "model"
        assert settings.placebo_steps and settings.placebo_lr and settings.placebo_rows  # its settings say so
        recipe = Placebo(
            settings.train_placebo, settings.placebo_steps, settings.placebo_lr, settings.placebo_rows,
            settings.placebo_rank, change_of(opened, config["tuned"]) if settings.placebo_match else None,
        )  # fmt: skip
        length, device = config["context_length"], settings.device
        models["placebo"] = str(
            train_placebo(config["base"], folder, recipe, context_length=length, seed=seed, device=device)
        )
    if settings.format_only is not None:
        models["format_only"] = settings.format_only
    if settings.rounded_bits is not None:
        folder = Path(settings.out) / "rounded" / "model"
        models["rounded"] = str(round_model(config["base"], folder, settings.rounded_bits))
    return models
