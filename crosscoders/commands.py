"""What the commands of `crosscoders` do, each as one function of its settings that returns a JSON object."""

import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from crosscoders import metrics, store
from crosscoders.adam8 import require_torchao
from crosscoders.cache import ActivationCache
from crosscoders.caching import run_cache
from crosscoders.cli import CacheSettings, EvalSettings, MergeSettings, TrainSettings
from crosscoders.config import CacheConfig, TrainConfig, to_dict
from crosscoders.errors import EnvironmentFault, InputError
from crosscoders.feed import open_feed
from crosscoders.formats import load_crosscoder
from crosscoders.merging import merge_parts
from crosscoders.pair import choose_device, identity
from crosscoders.progress import say
from crosscoders.provenance import environment, peak_memory_gib
from crosscoders.reporting import Log, evaluation_rows, row
from crosscoders.training import train as train_crosscoder
from crosscoders.writing import Rates

T = TypeVar("T")


def cache(settings: CacheSettings) -> dict[str, Any]:
    """`crosscoders cache`"""
    started = time.perf_counter()
    part = settings.chosen_part()
    made = run_cache(_only(CacheConfig, settings), part=part, devices=settings.chosen_devices())
    rates = made.rates
    if rates.n_tokens:
        say(f"cached {rates.n_tokens:,} tokens  {rates.text()}")
    if part:
        closing(started, f"part {part} in {settings.out}")
        say(f"next: crosscoders merge, with the folders of all {part.of} parts and --out CACHE")
        return result("cache", to_dict(settings), _rate_rows(rates))
    rows = _describe_caches(started, list(made.folders.values())) + _rate_rows(rates)
    return result("cache", to_dict(settings), rows)


def _rate_rows(rates: Rates) -> list[dict[str, Any]]:
    """Of this run; none when everything was there already."""
    if not rates.n_tokens:
        return []
    n = rates.n_tokens
    return [
        row("cache.tokens_per_second", n / rates.seconds, "tokens/s", n),
        row("cache.bytes_per_second", rates.n_bytes / rates.seconds, "bytes/s", n),
        row("cache.wait_fraction", rates.wait_seconds / rates.seconds, "fraction", n),
    ]


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
    if settings.cache is None:
        say(f"next: crosscoders cache --config {shlex.quote(str(settings.live))} --out CACHE")
    cache = shlex.quote(settings.cache) if settings.cache is not None else "CACHE"
    say(f"next: diffing scale {shlex.quote(settings.out)} --cache {cache}")
    return found


def train_run(settings: TrainSettings) -> dict[str, Any]:
    """Open the cache or the models, train, and return the JSON object."""
    started = time.perf_counter()
    config = _only(TrainConfig, settings)
    if config.adam_bits == 8:
        require_torchao()
    feed = open_feed(settings)
    out = Path(settings.out)
    inputs = feed.inputs["cache"]
    say(
        f"train {config.crosscoder.dict_size:,} latents ({config.crosscoder.activation}) on {inputs['hook_point']} of "
        f"{inputs['base']['name']} and {inputs['tuned']['name']}{'' if settings.cache else ', live'}: "
        f"{config.n_tokens:,} tokens, {config.n_steps / feed.stream.steps_per_epoch:.1f} epochs, to {out}; "
        f"needs {feed.memory}"
    )
    trained = train_crosscoder(config, feed.stream, out, holdout=feed.holdout, inputs=feed.inputs, log=_wandb(settings))
    closing(started, f"crosscoder in {out}")
    found = store.read_object(out / "eval.json", "rows")["rows"] if feed.holdout else []
    found.append(row("train.tokens", config.n_tokens, "tokens", config.n_tokens))
    return result("train", {**to_dict(config), "crosscoder": to_dict(trained.config)}, found)


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
    if settings.out is not None and Path(settings.out).is_dir():
        raise InputError(f"--out {settings.out!r} is a folder; the results are one JSON file. Name a file in it.")
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


def result(name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that --json prints."""
    return {"name": name, "config": config, "environment": environment(), "rows": rows}


def closing(started: float, text: str) -> None:
    """The last lines of a command: what was made, wall time, peak memory."""
    say(f"done in {time.perf_counter() - started:.0f} s, peak memory {peak_memory_gib():.2f} GiB: {text}")
