"""What the commands of `crosscoders` do, each as one function of its settings that returns a JSON object."""

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from crosscoders import metrics, store
from crosscoders.cache import ActivationCache
from crosscoders.caching import run_cache
from crosscoders.cli import CacheSettings, EvalSettings, MergeSettings, TrainSettings
from crosscoders.config import CacheConfig, TrainConfig, to_dict
from crosscoders.errors import EnvironmentFault, InputError
from crosscoders.formats import load_crosscoder
from crosscoders.merging import merge_parts
from crosscoders.pair import choose_device, identity
from crosscoders.progress import say
from crosscoders.provenance import environment, peak_memory_gib
from crosscoders.reporting import Log, evaluation_rows, row
from crosscoders.stream import cached_stream
from crosscoders.training import train as train_crosscoder

T = TypeVar("T")


def cache(settings: CacheSettings) -> dict[str, Any]:
    """`crosscoders cache`"""
    started = time.perf_counter()
    part = settings.chosen_part()
    made = run_cache(_only(CacheConfig, settings), part=part)
    if part:
        closing(started, f"part {part} in {settings.out}")
        say(f"next: crosscoders merge, with the folders of all {part.of} parts and --out CACHE")
        return result("cache", to_dict(settings), [])
    rows = _describe_caches(started, list(made.folders.values()))
    return result("cache", to_dict(settings), rows)


def merge(settings: MergeSettings) -> dict[str, Any]:
    """`crosscoders merge`"""
    started = time.perf_counter()
    if not settings.parts:
        raise InputError("parts is empty. Name the folders of all parts.")
    rows = _describe_caches(started, merge_parts(settings.parts, settings.out))
    say("the folders of the parts can be removed.")
    return result("merge", to_dict(settings), rows)


def _describe_caches(started: float, folders: list[str]) -> list[dict[str, Any]]:
    """Say what was made, and the rows of `--json`; those of several hook points carry their names."""
    rows = []
    for folder in folders:
        made = ActivationCache(folder)
        norms = made.mean_norm
        closing(started, f"{len(made):,} tokens, mean norm base {norms[0]:.2f} tuned {norms[1]:.2f}, in {made.path}")
        where = f".{made.manifest['hook_point']}" if len(folders) > 1 else ""
        rows.append(row(f"cache{where}.tokens", len(made), "tokens", len(made)))
        rows += [
            row(f"cache{where}.mean_norm.{name}", value, "activation", len(made))
            for name, value in zip(("base", "tuned"), norms, strict=True)
        ]
    say(f"next: crosscoders train --cache {shlex.quote(folders[0])} --out RUN --preset paper-batchtopk")
    return rows


def _only(kind: type[T], settings: Any) -> T:
    """The part of a command's settings that is a config of the library."""
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def train(settings: TrainSettings) -> dict[str, Any]:
    """`crosscoders train`"""
    found = train_run(settings)
    say(f"next: diffing scale {settings.out} --cache {settings.cache}")
    return found


def train_run(settings: TrainSettings) -> dict[str, Any]:
    """Open the cache, train, and return the JSON object."""
    started = time.perf_counter()
    config = _only(TrainConfig, settings)
    opened = ActivationCache(settings.cache)
    holdout, n_train = _holdout(settings, opened)
    stream = cached_stream(
        opened, batch_size=config.batch_size, buffer_tokens=config.buffer_tokens, seed=config.seed, n_tokens=n_train
    )
    out = Path(settings.out)
    say(
        f"train {config.crosscoder.dict_size:,} latents ({config.crosscoder.activation}) on "
        f"{opened.manifest['hook_point']} of {opened.manifest['base']['name']} and {opened.manifest['tuned']['name']}: "
        f"{config.n_tokens:,} tokens, {config.n_steps / stream.steps_per_epoch:.1f} epochs, to {out}"
    )
    inputs = cache_inputs(opened)
    if settings.eval_cache is not None:
        inputs["eval_cache"] = {"hash": ActivationCache(settings.eval_cache).manifest_hash}
    trained = train_crosscoder(config, stream, out, holdout=holdout, inputs=inputs, log=_wandb(settings))
    closing(started, f"crosscoder in {out}")
    found = store.read_object(out / "eval.json", "rows")["rows"] if holdout else []
    found.append(row("train.tokens", config.n_tokens, "tokens", config.n_tokens))
    return result("train", {**to_dict(config), "crosscoder": to_dict(trained.config)}, found)


def _holdout(settings: TrainSettings, opened: ActivationCache) -> tuple[Callable[[], Iterator[Tensor]] | None, int]:
    """A maker of held-out batches, and how many tokens are left for training."""
    if settings.eval_cache is not None:
        if settings.holdout_tokens:
            raise InputError("holdout_tokens has no effect with eval_cache. Give one of the two.")
        other = ActivationCache(settings.eval_cache)
        _require_same_source(opened, other)
        return lambda: (tokens.activations for tokens in other.batches(4096)), len(opened)
    if not settings.holdout_tokens:
        return None, len(opened)
    if settings.holdout_tokens < 32:
        raise InputError(f"holdout_tokens = {settings.holdout_tokens} is too few to evaluate on. Give 1,000 or more.")
    n_train = len(opened) - settings.holdout_tokens
    if n_train < settings.batch_size:
        raise InputError(
            f"holdout_tokens = {settings.holdout_tokens} leaves {n_train} of {len(opened)} tokens to train on. "
            "Lower it."
        )
    return lambda: (tokens.activations for tokens in opened.batches(4096, n_train)), n_train


def _require_same_source(opened: ActivationCache, other: ActivationCache) -> None:
    for key in ("hook_point", "d_model", "base", "tuned"):
        if identity(opened.manifest[key]) != identity(other.manifest[key]):
            raise InputError(
                f"eval_cache {str(other.path)!r} has another {key} than {str(opened.path)!r}. Cache the same pair."
            )


def require_same_source(crosscoder: str | Path, opened: ActivationCache) -> None:
    """Raise InputError when one of our crosscoders was trained on another pair or hook point than the cache holds."""
    path = Path(crosscoder) / "config.json"
    trained = store.read_object(path).get("provenance", {}).get("cache", {}) if path.is_file() else {}
    for key in ("hook_point", "base", "tuned"):
        if key in trained and identity(trained[key]) != identity(opened.manifest[key]):
            raise InputError(
                f"cache {str(opened.path)!r} has another {key} ({_named(opened.manifest[key])!r}) than the crosscoder "
                f"was trained on ({_named(trained[key])!r}). Cache the pair and hook point of the crosscoder."
            )


def _named(entry: Any) -> Any:
    return entry["name"] if isinstance(entry, dict) else entry


def _wandb(settings: TrainSettings) -> Log | None:
    if settings.wandb is None:
        return None
    try:
        import wandb
    except ImportError:
        raise EnvironmentFault("--wandb needs the package wandb. Run: pip install 'model-diffing[wandb]'") from None
    try:
        run = wandb.init(project=settings.wandb, config=to_dict(settings), dir=settings.out, resume="allow")
    except Exception as error:
        raise EnvironmentFault(f"wandb does not start: {error}. Log in, or set WANDB_MODE=offline.") from error
    return lambda line: run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """`crosscoders eval`"""
    opened = ActivationCache(settings.cache)
    require_same_source(settings.run, opened)
    crosscoder = load_crosscoder(settings.run, device=str(choose_device(settings.device)))
    n_tokens = min(settings.n_tokens or len(opened), len(opened))
    found = metrics.evaluate(crosscoder, (tokens.activations for tokens in opened.batches(4096, 0, n_tokens)))
    described = result("eval", to_dict(settings), evaluation_rows(found))
    for entry in described["rows"]:
        say(f"{entry['name']} {entry['value']:.4f} {entry['unit']}  n {entry['n']:,} tokens")
    if settings.out:
        store.write_json(Path(settings.out), described)
    return described


def cache_inputs(opened: ActivationCache) -> dict[str, Any]:
    """What of a cache is recorded beside every result made from it."""
    manifest = opened.manifest
    kept = ("hook_point", "base", "tuned", "tokenizer_hash", "template_hash", "groups", "dtype", "drop_bos")
    return {
        "cache": {
            "path": str(opened.path),
            "hash": opened.manifest_hash,
            "n_tokens": len(opened),
            **{key: manifest[key] for key in kept},
        }
    }


def result(name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that --json prints."""
    return {"name": name, "config": config, "environment": environment(), "rows": rows}


def closing(started: float, text: str) -> None:
    """The last lines of a command: what was made, wall time, peak memory."""
    say(f"done in {time.perf_counter() - started:.0f} s, peak memory {peak_memory_gib():.2f} GiB: {text}")
