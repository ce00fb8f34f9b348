"""`sae-lora fit | eval`: settings and messages only."""

from dataclasses import dataclass, field

from crosscoders.command import Command
from crosscoders.command import main as run_main
from sae_lora.config import PRESETS, FitConfig, TextConfig


@dataclass(frozen=True, kw_only=True)
class FitSettings(FitConfig):
    """Fit LoRA so that the model with dictionaries spliced in predicts what it predicts without them."""

    out: str
    """Run folder; an interrupted run there goes on."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings(TextConfig):
    """Cross-entropy and KL with adapter and dictionary off and on, and what the adapter closed."""

    run: str
    """Run folder of `sae-lora fit`, or its adapter folder."""
    n_tokens: int = field(default=200_000)
    """Scored tokens to read, best of documents that were not fitted on."""
    model: str | None = None
    """Model, where it is no longer at the place that the adapter's sidecar names."""
    dictionary: str | list[str] | None = None
    """Dictionaries, for the same reason, in the order of the sidecar."""
    other_model: str | None = None
    """Other model of a crosscoder, for the same reason."""
    out: str | None = None
    """JSON file for the results."""


COMMANDS = [
    Command(
        "fit",
        "Fit LoRA around frozen dictionaries.",
        FitSettings,
        "sae_lora.commands:fit_command",
        presets=PRESETS,
    ),
    Command(
        "eval",
        "Cross-entropy and KL with adapter and dictionary off and on.",
        EvalSettings,
        "sae_lora.commands:eval_command",
        positional="run",
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command `sae-lora`."""
    return run_main("sae-lora", "LoRA around frozen sparse dictionaries.", COMMANDS, argv)
