"""`sae-lora fit | eval | compare | finetune-sae`: settings and messages only."""

from crosscoders.common.command_line import Command
from crosscoders.common.command_line import main as run_main
from sae_lora.evaluation.settings import CompareSettings, EvalSettings
from sae_lora.finetuning.settings import FinetuneSaeSettings
from sae_lora.fitting.settings import PRESETS, FitSettings

COMMANDS = [
    Command(
        "fit",
        "Fit LoRA around frozen dictionaries.",
        FitSettings,
        "sae_lora.fitting.command:fit_command",
        presets=PRESETS,
    ),
    Command(
        "eval",
        "Cross-entropy and KL with adapter and dictionary off and on.",
        EvalSettings,
        "sae_lora.evaluation.command:eval_command",
        positional="run",
    ),
    Command(
        "compare",
        "Several fits in one table: what each closed, left and cost.",
        CompareSettings,
        "sae_lora.evaluation.command:compare_command",
        positional="runs",
    ),
    Command(
        "finetune-sae",
        "Fine-tune an SAE to a tuned model: a twin with the same latent numbers.",
        FinetuneSaeSettings,
        "sae_lora.finetuning.command:finetune_sae_command",
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Run the console command `sae-lora` and return its exit status."""
    return run_main("sae-lora", "LoRA around frozen sparse dictionaries.", COMMANDS, argv)
