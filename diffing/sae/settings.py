"""Settings of `diffing sae`. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from crosscoders.common.checks import require_range
from crosscoders.text.settings import TEMPLATE_DATE, DataSource


@dataclass(frozen=True, kw_only=True)
class SaeSettings:
    """Read one SAE in both models: which latents changed, and which of them cause the difference. Trains nothing."""

    base: str
    """Base model: local folder or hub id."""
    tuned: str
    """Tuned model: local folder, hub id, or a PEFT adapter of the base model."""
    sae: str
    """SAE of the base model: a folder, a file, or RELEASE/ID of SAELens's list."""
    tuned_sae: str | None = None
    """Its twin: an SAE of the tuned model with the same latent numbers, as `sae-lora finetune-sae` makes."""
    hook_point: str | None = None
    """Where the SAE belongs, if its files do not say it."""
    null: str | None = None
    """Null model, best a placebo: the base, tuned as long on text without the new behaviour. Gives the thresholds."""
    data: str | list[str | DataSource]
    """Documents: a path or `datasets` id, or a list of them; those with messages also measure KL."""
    out: str
    """Folder of the activations and of the results; activations that are there are used again."""
    n_tokens: int = 200_000
    """Scored tokens to read."""
    context_length: int = 1024
    """Tokens of a document that are read."""
    n_documents: int = 128
    """Chats on whose responses attribution and KL are measured; 0: none, rates only."""
    n_latents: int = 32
    """First latents of each order: they are shown, patched one by one, and set the thresholds for the null."""
    chat_template: str | None = None
    """File with a chat template, for pairs without one."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD, which a chat template that writes today's date gets instead."""
    batch_rows: int = 8
    """Documents in one forward pass."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the order of documents, of the split null and of resamples."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "n_tokens", "context_length", "n_latents", "batch_rows")
        require_range(self, 0, None, "n_documents")
        require_range(self, 0, 2**63 - 1, "seed")
