"""`crosscoders train` and `crosscoders eval`, each as one function of its settings that returns a JSON object."""

import shlex
import time
from pathlib import Path
from typing import Any

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.checks import config_of, to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import EnvironmentFault, InputError
from crosscoders.common.memory import keep_large_blocks
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord, result, row, say_closing
from crosscoders.dictionary import metrics
from crosscoders.formats.load import load_crosscoder
from crosscoders.training.adam8 import require_torchao
from crosscoders.training.feed import open_feed, require_same_source
from crosscoders.training.log import Log, evaluation_rows
from crosscoders.training.loop import train as train_crosscoder
from crosscoders.training.settings import EvalSettings, TrainConfig, TrainSettings


class WandbRecord(Record):
    """wandb.json: the run of Weights & Biases that a training run goes on with."""

    version = 1
    id: str


def train(settings: TrainSettings) -> dict[str, Any]:
    """Run `crosscoders train`: train, and say what to run next."""
    described = train_run(settings)
    if settings.cache is None:
        say(f"next: crosscoders cache --config {shlex.quote(str(settings.live))} --out CACHE")
    cache = shlex.quote(settings.cache) if settings.cache is not None else "CACHE"
    say(f"next: diffing scale {shlex.quote(settings.out)} --cache {cache}")
    return described


def train_run(settings: TrainSettings) -> dict[str, Any]:
    """Open the cache or the models, train, and return the JSON object."""
    started = time.perf_counter()
    config = config_of(TrainConfig, settings)
    if config.adam_bits == 8:
        require_torchao()
    keep_large_blocks()
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
    say_closing(started, f"crosscoder in {out}")
    rows = files.read_model(out / "eval.json", ResultRecord)["rows"] if feed.holdout else []
    rows.append(row("train.tokens", config.n_tokens, "tokens", config.n_tokens))
    return result("train", {**to_dict(config), "crosscoder": to_dict(trained.config)}, rows)


def _wandb(settings: TrainSettings) -> Log | None:
    if settings.wandb is None:
        return None
    try:
        import wandb
    except ImportError:
        raise EnvironmentFault("--wandb needs the package wandb. Run: pip install 'model-diffing[wandb]'") from None
    path = Path(settings.out) / "wandb.json"
    known = {"id": files.read_model(path, WandbRecord)["id"]} if path.is_file() else {}
    try:
        run = wandb.init(project=settings.wandb, config=to_dict(settings), dir=settings.out, resume="allow", **known)
    except Exception as error:
        raise EnvironmentFault(f"wandb does not start: {error}. Log in, or set WANDB_MODE=offline.") from error
    files.write_json(path, {"format_version": WandbRecord.version, "id": run.id})
    return lambda line: run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """Run `crosscoders eval`: measure a crosscoder on a cache, and say and write the results."""
    if settings.out is not None and Path(settings.out).is_dir():
        raise InputError(f"--out {settings.out!r} is a folder; the results are one JSON file. Name a file in it.")
    opened = ActivationCache(settings.cache)
    require_same_source(settings.run, opened)
    crosscoder = load_crosscoder(settings.run, device=str(choose_device(settings.device)))
    n_tokens = min(settings.n_tokens or len(opened), len(opened))
    evaluation = metrics.evaluate(crosscoder, (tokens.activations for tokens in opened.batches(4096, 0, n_tokens)))
    described = result("eval", to_dict(settings), evaluation_rows(evaluation))
    for entry in described["rows"]:
        say(f"{entry['name']} {entry['value']:.4f} {entry['unit']}  n {entry['n']:,} tokens")
    if settings.out:
        files.write_json(Path(settings.out), described)
    return described
