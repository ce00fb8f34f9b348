"""`diffing scale | null | report | demo`. Settings and messages only; the work is in the modules that the commands
name."""

from dataclasses import dataclass, field

from crosscoders.command import Command
from crosscoders.command import main as run_main
from crosscoders.config import require_positive, require_range
from crosscoders.errors import InputError


@dataclass(frozen=True)
class ScaleSettings:
    """Latent Scaling, verdicts and examples for every latent of a run."""

    run: str
    """Run folder of `crosscoders train`."""
    cache: str | None = None
    """Folder of `crosscoders cache`; default: the one that the run was trained on."""
    n_tokens: int | None = None
    """Tokens to read; default: all."""
    n_examples: int = 64
    """Latents, from the most tuned-specific on, for which examples are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "n_tokens", "n_examples")


@dataclass(frozen=True)
class NullSettings:
    """The same pipeline on null pairs: a false-positive rate for every count of specific latents."""

    run: str
    """Run folder, after `diffing scale`."""
    out: str
    """Folder of the null models, caches and crosscoders; what is finished there is used again."""
    cache: str | None = None
    """Folder of `crosscoders cache`; default: the one that the run was trained on."""
    placebo: str | None = None
    """Null model: the base, tuned as long as the tuned model but on raw text only. Folder, hub id or PEFT adapter."""
    format_only: str | None = None
    """Null model: tuned on dialogues of the same format without the behaviour of interest."""
    rounded_bits: int | None = None
    """Make a null of the base itself: its weights, rounded to this many significant bits (bfloat16 has 8)."""
    train_placebo: str | None = None
    """Make a placebo: tune the base on this text (file, folder or `datasets` id)."""
    placebo_steps: int | None = None
    """Steps of that fine-tune; take those of the tuned model."""
    placebo_lr: float | None = None
    """Its peak learning rate."""
    placebo_rows: int | None = None
    """Its rows of context_length tokens in a step."""
    placebo_rank: int | None = None
    """Its LoRA rank; default: all weights are tuned."""
    n_seeds: int = 3
    """Crosscoder seeds, of the pair and of the placebo and format-only nulls: the run's own, on which thresholds are
    fixed, and those after it, on which they are checked."""
    rates: list[float] = field(default_factory=lambda: [0.0, 0.01])
    """False-positive rates for which thresholds are sought."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 1, 1000, "n_seeds")
        require_range(self, 2, 24, "rounded_bits")
        wrong = [rate for rate in self.rates if not 0 <= rate < 1]
        if wrong or not self.rates:
            said = f"hold {wrong[0]}" if wrong else "are empty"
            raise InputError(f"rates {said}; give false-positive rates from 0 to below 1, such as [0, 0.01].")
        given = [self.placebo, self.train_placebo, self.format_only]
        if given == [None, None, None]:
            raise InputError(
                "no null is named that fixes a threshold. Give placebo, format_only or train_placebo; rounded_bits is "
                "counted at the thresholds of the others."
            )
        if self.placebo is not None and self.train_placebo is not None:
            raise InputError("placebo and train_placebo name the same null. Give one of the two.")
        training = ("placebo_steps", "placebo_lr", "placebo_rows")
        if self.train_placebo is None:
            unused = [name for name in (*training, "placebo_rank") if getattr(self, name) is not None]
            if unused:
                raise InputError(f"{unused[0]} has no effect without text. Give --train-placebo TEXT as well.")
            return
        missing = [name for name in training if getattr(self, name) is None]
        if missing:
            raise InputError(
                f"train_placebo needs {missing[0]}. Take the value with which the tuned model was trained."
            )
        require_positive(self, *training, *(["placebo_rank"] if self.placebo_rank is not None else []))


@dataclass(frozen=True)
class ReportSettings:
    """One self-contained HTML page and one JSON file about a run."""

    run: str
    """Run folder, after `diffing scale`."""


@dataclass(frozen=True)
class DemoSettings:
    """The whole path on the embedded pair of models: cache, train, scale, report."""

    out: str = "runs/demo"
    """Folder for the caches, the run and the report."""
    n_tokens: int = 250_000
    """Tokens in the cache, half raw text, half dialogues; training reads them in several epochs."""
    seed: int = 0
    """Seed of data order and weights."""
    null_seeds: int = 0
    """Crosscoder seeds with which counts are calibrated on the embedded null models (one takes about two minutes,
    three about eight); 0: no calibration."""

    def __post_init__(self) -> None:
        require_range(self, 0, 1000, "null_seeds")
        require_range(self, 10_000, None, "n_tokens")
        require_range(self, 0, 2**63 - 1, "seed")


COMMANDS = [
    Command(
        "scale",
        "Latent Scaling, verdicts and examples for every latent of a run.",
        ScaleSettings,
        "diffing.commands:scale",
        "run",
    ),
    Command(
        "null",
        "False-positive rates of specific latents, from null pairs.",
        NullSettings,
        "diffing.commands:null",
        "run",
    ),
    Command(
        "report",
        "One self-contained HTML page and one JSON file about a run.",
        ReportSettings,
        "diffing.commands:report",
        "run",
    ),
    Command(
        "demo",
        "The whole path on the embedded pair of models, in minutes on a CPU.",
        DemoSettings,
        "diffing.commands:demo",
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command `diffing`."""
    return run_main("diffing", "What a fine-tune changed inside a language model.", COMMANDS, argv)
