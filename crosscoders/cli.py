"""`crosscoders cache | merge | train | eval`: settings and messages only; the work is in the modules named here."""

from crosscoders.activations.settings import CACHE, MergeSettings
from crosscoders.common.command_line import Command
from crosscoders.common.command_line import main as run_main
from crosscoders.training.settings import PRESETS, EvalSettings, TrainSettings, fit_to_length

COMMANDS = [
    CACHE,
    Command(
        "merge",
        "Put the parts of a cache together.",
        MergeSettings,
        "crosscoders.activations.command:merge",
        positional="parts",
        takes_url=True,
    ),
    Command(
        "train",
        "Train a crosscoder on a cache, or live on the models.",
        TrainSettings,
        "crosscoders.training.command:train",
        presets=PRESETS,
        example="--cache caches/mine --preset demo",
        fit_preset=lambda preset, settings: fit_to_length(preset, settings["n_tokens"], settings["batch_size"]),
    ),
    Command(
        "eval",
        "FVE, L0 and dead latents of a crosscoder on a cache.",
        EvalSettings,
        "crosscoders.training.command:evaluate",
        positional="run",
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Run the console command `crosscoders` and return its exit status."""
    return run_main("crosscoders", "Sparse dictionaries over the activations of several models.", COMMANDS, argv)
