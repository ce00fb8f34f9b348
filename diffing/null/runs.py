"""The same pipeline on a null pair: cache -> crosscoder -> latent table, with the settings of the run that is judged.

In come a scaled run and its cache; for a null model, `null_cache` reads the same tokens with `tuned` replaced, and
`null_run` trains and scales with the config of the run, another seed at most. All that is finished is reused.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pandas

from crosscoders import ActivationCache, run_cache
from crosscoders.activations.plan import make_plan
from crosscoders.activations.settings import CacheConfig
from crosscoders.common import files
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.dictionary.settings import CrosscoderConfig
from crosscoders.formats.load import load_crosscoder
from crosscoders.models.names import hash_model, identity, load_auto
from crosscoders.models.pair import inspect_pair
from crosscoders.text.settings import DataSource
from crosscoders.training.checkpoint import RunRecord
from crosscoders.training.command import train_run
from crosscoders.training.settings import TrainConfig, TrainSettings
from diffing.latents.records import LatentRecord
from diffing.latents.table import cache_table, cache_tokenizer, write_table
from diffing.null.rates import effective_number


class TrainRecord(RunRecord):
    """run.json of `crosscoders train`"""

    config: TrainConfig  # type: ignore[assignment]  # narrower: what every run records is plain data


class Scaled(NamedTuple):
    """One crosscoder with its latent table."""

    table: pandas.DataFrame
    n_effective: float
    """Number of independent latents that the alive ones count as."""


def read_config(run: Path, device: str) -> TrainConfig:
    """Return the resolved training config of a run folder.

    Raises:
        InputError: it is no run folder of ours, or it was not scaled.
    """
    if not (run / "run.json").is_file():
        raise InputError(f"{str(run)!r} is not a run folder (no run.json). Name one of `crosscoders train`.")
    if not (run / "latents.json").is_file():
        raise InputError(f"{str(run)!r} has no latents.json. Run: diffing scale {run}")
    config = files.read_model(run / "run.json", TrainRecord)["config"]
    known = {field.name for field in fields(TrainConfig)}
    shape = CrosscoderConfig(**config["crosscoder"])
    return TrainConfig(
        **{key: value for key, value in config.items() if key in known} | {"crosscoder": shape, "device": device}
    )


def null_cache(opened: ActivationCache, model: str, out: Path, device: str, *, force: bool = False) -> ActivationCache:
    """Cache the tokens of `opened` with `model` in place of the tuned model, in `out`.

    Raises:
        InputError: the model does not fit the base, or the data are not what they were.
    """
    settings = opened.manifest["config"]
    require_null(settings["base"], model, opened)
    tokenizer = settings["tokenizer"] or cache_tokenizer(opened).name_or_path
    sources = [DataSource(**source) for source in settings["data"]]
    changed = {"tuned": model, "tokenizer": tokenizer, "data": sources, "out": str(out), "device": device}
    config = CacheConfig(**settings | changed)
    if not (out / "manifest.json").is_file():  # before a model loads
        plan = make_plan(config)
        for key, now in (plan.info.hashes() | {"token_hash": plan.shared["token_hash"]}).items():
            if key != "tuned" and identity(opened.manifest[key]) != identity(now):
                raise InputError(_changed(opened, key))
    run_cache(config, force=force)
    cache = ActivationCache(out)
    if cache.manifest["token_hash"] != opened.manifest["token_hash"]:
        raise InputError(_changed(opened, "token_hash"))
    return cache


def _changed(opened: ActivationCache, key: str) -> str:
    what = {"base": "base model", "tokenizer_hash": "tokenizer"}.get(key, "data")
    return (
        f"the {what} of cache {str(opened.path)!r} changed since the cache was made, so a null would see something "
        "else. Restore it, or cache, train and scale again."
    )


def require_null(base: str, model: str, opened: ActivationCache) -> None:
    """Raise InputError unless `model` has the base's architecture, width and tokenizer and is not the pair's tuned
    model; by configurations alone."""
    settings = opened.manifest["config"]
    info = inspect_pair(base, model, [settings["hook_point"]], tokenizer=settings["tokenizer"])
    if info.adapter is None:
        kinds = [load_auto(name, "config").model_type for name in (base, model)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"null model {model!r} is a {kinds[1]} but the base {base!r} is a {kinds[0]}. A null is a copy of the "
                "base that was trained on something else; give one of the same architecture."
            )
    for role in ("base", "tuned"):
        if hash_model(model) == opened.manifest[role]["hash"]:
            own = "base" if role == "base" else "tuned model"
            raise InputError(f"null model {model!r} is the {own} itself. Give another tune, without the behaviour.")


def null_run(config: TrainConfig, cache: ActivationCache, out: Path, n_tokens: int, *, force: bool = False) -> Scaled:
    """Train a crosscoder on `cache` and scale it on its first `n_tokens`, in `out`."""
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    train_run(TrainSettings(**settings, cache=str(cache.path), out=str(out), force=force))
    described = out / "latents.json"
    if described.is_file():
        scaled = files.read_model(described, LatentRecord)
        if scaled["n_tokens"] == n_tokens and scaled["cache"]["hash"] == cache.manifest_hash:
            return read_scaled(out)
    crosscoder = load_crosscoder(out, device=str(choose_device(config.device)))
    table, scales, _ = cache_table(crosscoder, cache, n_tokens)
    write_table(out, table, scales, cache)
    return read_scaled(out)


def read_scaled(run: Path) -> Scaled:
    """Return the latent table of a scaled run, and how many independent latents it counts as."""
    columns: dict[str, Any] = files.read_model(run / "latents.json", LatentRecord)["columns"]
    table = pandas.DataFrame(columns).set_index("latent")
    return Scaled(table, effective_number(load_crosscoder(run), table))
