"""Small finished caches, runs and fits on the embedded pair, made once by the commands themselves."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.play import Seen, play
from crosscoders.common import files
from crosscoders.common.errors import EnvironmentFault
from crosscoders.common.progress import say
from diffing.demo import ASSETS

N_TOKENS, SHARD = 2000, 500
DATA = [str(ASSETS / "corpus" / f"{name}_heldout.jsonl.gz") for name in ("raw", "dialogues")]


class World(NamedTuple):
    """Folders of what was made; none of it is written to."""

    folder: Path

    def at(self, name: str) -> str:
        """Return the path of one of them."""
        return str(self.folder / name)


def cache_line(out: str, **changes: object) -> list[str]:
    """Return the command that makes the cache, with other settings where asked."""
    settings = {
        "base": ASSETS / "base", "tuned": ASSETS / "tuned", "hook_point": "blocks.2.hook_resid_post",
        "data": json.dumps(DATA), "context_length": 64, "batch_rows": 4, "shard_tokens": SHARD, "n_tokens": N_TOKENS,
        "out": out, **changes,
    }  # fmt: skip
    return ["crosscoders", "cache", *flags(settings)]


def train_line(cache: str, out: str, **changes: object) -> list[str]:
    """Return the command that trains on the cache."""
    settings = {
        "crosscoder.dict_size": 64, "crosscoder.k": 8, "batch_size": 100, "n_tokens": 6000, "lr": 1e-3,
        "lr_warmup_steps": 10, "threshold_start_step": 10, "dead_after_tokens": 20000, "buffer_tokens": 1000,
        "holdout_tokens": 400, "log_every": 10, "checkpoint_every": 20, "cache": cache, "out": out, **changes,
    }  # fmt: skip
    return ["crosscoders", "train", *flags(settings)]


def fit_line(run: str, out: str, **changes: object) -> list[str]:
    """Return the command that fits a LoRA around the base's side of a crosscoder."""
    settings = {
        "model": ASSETS / "base", "data": json.dumps(DATA[:1]), "n_tokens": 300, "context_length": 32, "batch_rows": 4,
        "rank": 2, "lr": 1e-3, "dictionary": run, "side": "base", "out": out, **changes,
    }  # fmt: skip
    return ["sae-lora", "fit", *flags(settings)]


def fit_eval_line(fit: str) -> list[str]:
    """Return the command that measures a fit."""
    return ["sae-lora", "eval", fit, *flags({"data": DATA[0], "n_tokens": 100, "context_length": 32}), "--json"]


def flags(settings: dict[str, object]) -> list[str]:
    """Return settings as words of a command line; None leaves one out."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]


def make_world(folder: Path) -> World:
    """Make everything that is not there yet.

    Raises:
        EnvironmentFault: a command failed.
    """
    world = World(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cache, run, fit = world.at("cache"), world.at("run"), world.at("fit")
    for name, line in {
        "cache": cache_line(cache), "part": cache_line(world.at("part"), part="1/1"),
        "run": train_line(cache, run), "run/latents.json": ["diffing", "scale", run],
        "run/causal.json": ["diffing", "causal", run, "--n-documents=20", "--n-latents=4", "--random-draws=2"],
        "fit": fit_line(run, fit),
    }.items():  # fmt: skip
        if not (folder / name).exists():
            require(play(line), line)
            say(f"made {name}")
    if not (folder / "killed").is_dir():
        shutil.copytree(run, folder / "killed")
        for name in ("config.json", "model.safetensors", "eval.json"):
            (folder / "killed" / name).unlink()
    if not (folder / "begun").is_dir():
        begun = shutil.copytree(world.at("part"), folder / "begun")
        whole = json.loads((begun / "part.json").read_text())
        (begun / "part.json").unlink()
        progress = {k: v for k, v in whole.items() if k not in ("config", "shards", "part", "content_checksum")}
        files.write_json(begun / "progress.json", progress)
        (begun / "shard-00003.safetensors").unlink()
        (begun / "sums-00003.json").unlink()
    return world


def require(seen: Seen, line: list[str]) -> None:
    """Raise EnvironmentFault where a command that has to work did not."""
    if seen.status:
        raise EnvironmentFault(f"{' '.join(line[:2])} ended with status {seen.status}: {seen.message}")
