"""Settings of the commands of `diffing`."""

from crosscoders.common.command_line import Command
from crosscoders.common.command_line import main as run_main
from diffing.causal.settings import CausalSettings, LensSettings, SteerSettings
from diffing.comparison.settings import CompareSettings
from diffing.decomposition.settings import VPD_PAPER, DecomposeSettings
from diffing.demo.settings import DemoSettings
from diffing.doctor.settings import DoctorSettings
from diffing.explorer.settings import ExploreSettings
from diffing.interpretation.settings import InterpretSettings
from diffing.latents.settings import ScaleSettings, StabilitySettings
from diffing.null.settings import NullSettings
from diffing.report.settings import ReportSettings
from diffing.sae.settings import SaeSettings
from diffing.sae_gap.settings import SaeGapSettings
from diffing.samples.settings import RepliesSettings, SaySettings
from diffing.sharing.settings import ExportSettings, PushSettings
from diffing.topk_lora.settings import PRESETS, TopKEvalSettings, TopKFitSettings, TopKSetsSettings

COMMANDS = [
    Command(
        "say",
        "What the tuned model says and the base does not, in minutes and without training.",
        SaySettings,
        "diffing.samples.command:say",
    ),
    Command(
        "replies",
        "How both models answer the same prompts: words, lengths, refusals, formats.",
        RepliesSettings,
        "diffing.samples.command:replies",
    ),
    Command(
        "sae",
        "One SAE in both models: which latents changed, and which cause the difference.",
        SaeSettings,
        "diffing.sae.command:sae",
    ),
    Command(
        "compare",
        "Every method on one table, beside a null model and random: directions, scores per token, texts.",
        CompareSettings,
        "diffing.comparison.command:compare",
    ),
    Command(
        "sae-gap",
        "What a dictionary cannot express of a fine-tune: LoRA around it in both models.",
        SaeGapSettings,
        "diffing.sae_gap.command:sae_gap",
    ),
    Command(
        "scale",
        "Latent Scaling, verdicts and examples for every latent of a run.",
        ScaleSettings,
        "diffing.latents.command:scale",
        "run",
    ),
    Command(
        "causal",
        "Share of the KL between the models that chosen latents close.",
        CausalSettings,
        "diffing.causal.command:causal",
        "run",
    ),
    Command(
        "steer",
        "Add a latent's decoder to a model while it answers.",
        SteerSettings,
        "diffing.causal.command:steer",
        "run",
    ),
    Command(
        "lens",
        "Tokens that the decoders of latents write for.",
        LensSettings,
        "diffing.causal.command:lens",
        "run",
    ),
    Command(
        "interpret",
        "Tokens and labels that tell where latents fire; names from an endpoint, with scores.",
        InterpretSettings,
        "diffing.interpretation.command:interpret_run",
        "run",
    ),
    Command(
        "stability",
        "Which latents come back in other training runs of the same pair.",
        StabilitySettings,
        "diffing.latents.command:stability",
        "runs",
    ),
    Command(
        "report",
        "One self-contained HTML page and one JSON file about a run.",
        ReportSettings,
        "diffing.report.command:report",
        "run",
    ),
    Command(
        "explore",
        "A local page with both models live: prompts, latents, answers.",
        ExploreSettings,
        "diffing.explorer.command:explore",
        "run",
    ),
    Command(
        "export",
        "A run as others read it: CSV, Parquet, a folder for Neuronpedia.",
        ExportSettings,
        "diffing.sharing.command:export",
        "run",
    ),
    Command(
        "push",
        "A crosscoder, SAE, adapter or TopKLoRA to the hub, with a model card made from its run.",
        PushSettings,
        "diffing.sharing.command:push",
        "run",
    ),
    Command(
        "demo",
        "The whole path on the embedded pair of models, in minutes on a CPU.",
        DemoSettings,
        "diffing.demo.command:demo",
    ),
    Command(
        "doctor",
        "What this machine has, and what it can run.",
        DoctorSettings,
        "diffing.doctor.command:doctor",
    ),
    Command(
        "null",
        "False-positive rates of specific latents, from null pairs.",
        NullSettings,
        "diffing.null.command:null",
        "run",
    ),
    Command(
        "topk-lora fit",
        "Distil the tuned model into the base with a sparse adapter.",
        TopKFitSettings,
        "diffing.topk_lora.command:fit",
        presets=PRESETS,
    ),
    Command(
        "topk-lora eval",
        "Held-out KL, internal faithfulness and directions of a run.",
        TopKEvalSettings,
        "diffing.topk_lora.command:evaluate",
        "run",
    ),
    Command(
        "topk-lora sets",
        "The smallest set of directions behind each behaviour, audited on other prompts.",
        TopKSetsSettings,
        "diffing.topk_lora.sets_command:find_sets",
        "run",
    ),
    Command(
        "decompose",
        "What a fine-tune changed in the weights, as rank-one pieces with a causal importance per token.",
        DecomposeSettings,
        "diffing.decomposition.command:decompose",
        presets={"vpd-paper": VPD_PAPER},
    ),
]


def main(argv: list[str] | None = None) -> int:
    """Run the console command `diffing`."""
    return run_main("diffing", "What a fine-tune changed inside a language model.", COMMANDS, argv)
