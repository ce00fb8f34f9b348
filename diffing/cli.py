"""`diffing scale | report | demo | null`. Settings and messages only; the work is in the modules that the commands
name."""

from dataclasses import dataclass

from crosscoders.command import Command
from crosscoders.command import main as run_main
from crosscoders.config import require_range
from diffing.null.settings import NullSettings


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
    Command(
        "null",
        "False-positive rates of specific latents, from null pairs.",
        NullSettings,
        "diffing.commands:null",
        "run",
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command `diffing`."""
    return run_main("diffing", "What a fine-tune changed inside a language model.", COMMANDS, argv)
