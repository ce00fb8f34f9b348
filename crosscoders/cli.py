"""`crosscoders cache | merge | train | eval`: settings and messages only; the work is in the modules named here."""

from dataclasses import dataclass, field

from crosscoders.command import Command
from crosscoders.command import main as run_main
from crosscoders.config import PRESETS, CacheConfig, TrainConfig, require_range
from crosscoders.errors import InputError
from crosscoders.parts import Part, parse_part


@dataclass(frozen=True)
class CacheSettings(CacheConfig):
    """Store paired activations of a base and a tuned model on disk."""

    part: str | None = None
    """i/n: make only the i-th of n parts, for job arrays; `crosscoders merge` puts them together."""
    devices: str | None = None
    """Several devices that work at once, each on a part that is merged at the end: cuda:0,cuda:1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen_part()
        if self.devices is not None:
            if self.part is not None:
                raise InputError("part has no effect with devices, which make all parts. Give one of the two.")
            if self.device != "auto":
                raise InputError(f"device {self.device!r} has no effect with devices. Give one of the two.")

    def chosen_devices(self) -> list[str] | None:
        """The setting `devices` as a list."""
        return self.devices.replace(" ", "").split(",") if self.devices is not None else None

    def chosen_part(self) -> Part | None:
        """The setting `part`, read."""
        return parse_part(self.part) if self.part is not None else None


@dataclass(frozen=True)
class MergeSettings:
    """Put the parts of a cache together."""

    parts: list[str]
    """Folders of `crosscoders cache --part`, all of one run."""
    out: str
    """Folder of the cache; shard files are linked, not copied, where it lies on the same disk."""


@dataclass(frozen=True)
class TrainSettings(TrainConfig):
    """Train a crosscoder on a cache of paired activations, or on the models themselves."""

    cache: str | None = None
    """Folder of `crosscoders cache`."""
    out: str = field(kw_only=True)
    """Run folder; an interrupted run there goes on."""
    live: str | None = None
    """In place of a cache: the YAML file of `crosscoders cache --config`. The models run while training reads their
    activations, and nothing is stored; the batches are those of the cache. `out` in it has no meaning here."""
    mean_norm: list[float] | None = None
    """With live: mean of ||x|| of base and tuned, for input_norm sqrt_d; default: that of the first 16,384 tokens. With
    the numbers of the cache (`crosscoders cache --json`), the weights are those of training on the cache."""
    eval_cache: str | None = None
    """Cache of held-out documents."""
    wandb: str | None = None
    """Weights & Biases project that gets every line of train.jsonl too (needs the extra `wandb`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cache is None) == (self.live is None):
            raise InputError("train needs one of the two: --cache FOLDER, or --live CONFIG.yaml.")
        if self.mean_norm is not None:
            if self.cache is not None:
                raise InputError("mean_norm has no effect with cache, which has its own. Remove it.")
            if len(self.mean_norm) != 2 or not all(0 < value < float("inf") for value in self.mean_norm):
                raise InputError(f"mean_norm is {self.mean_norm}; give two numbers above 0: [base, tuned].")


@dataclass(frozen=True)
class EvalSettings:
    """FVE, L0 and dead latents of a crosscoder on a cache."""

    run: str
    """Run folder, crosscoder folder or hub repository."""
    cache: str
    """Folder of `crosscoders cache`, best with documents that were not trained on."""
    n_tokens: int | None = None
    """Tokens to read; default: all."""
    out: str | None = None
    """JSON file for the results."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "n_tokens")


COMMANDS = [
    Command(
        "cache",
        "Store paired activations of a base and a tuned model on disk.",
        CacheSettings,
        "crosscoders.commands:cache",
    ),
    Command(
        "merge",
        "Put the parts of a cache together.",
        MergeSettings,
        "crosscoders.commands:merge",
        positional="parts",
    ),
    Command(
        "train",
        "Train a crosscoder on a cache, or live on the models.",
        TrainSettings,
        "crosscoders.commands:train",
        presets=PRESETS,
    ),
    Command(
        "eval",
        "FVE, L0 and dead latents of a crosscoder on a cache.",
        EvalSettings,
        "crosscoders.commands:evaluate",
        positional="run",
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command `crosscoders`."""
    return run_main("crosscoders", "Sparse dictionaries over the activations of several models.", COMMANDS, argv)
