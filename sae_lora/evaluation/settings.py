"""Settings of `sae-lora eval | compare`."""

from dataclasses import dataclass, field

from crosscoders.common.checks import require_range
from sae_lora.fitting.settings import TextConfig


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
    stability: int = 0
    """Latents to ablate before and after, of each dictionary; 0: none."""
    out: str | None = None
    """JSON file for the results."""
    force: bool = False
    """Go on where the estimate of memory is above what the machine has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, None, "stability")


@dataclass(frozen=True, kw_only=True)
class CompareSettings(TextConfig):
    """Several fits of one model, dictionary and text side by side: what each closed, left and cost."""

    runs: list[str]
    """Run folders of `sae-lora fit`, with different names; the first is what the others are compared with."""
    n_tokens: int = field(default=200_000)
    """Scored tokens to read, best of documents that were not fitted on."""
    model: str | None = None
    """Model, where it is no longer at the place that the sidecars name."""
    dictionary: str | list[str] | None = None
    """Dictionaries, for the same reason, in the order of the sidecars."""
    other_model: str | None = None
    """Other model of a crosscoder, for the same reason."""
    out: str | None = None
    """JSON file for the results."""
    force: bool = False
    """Go on where the estimate of memory is above what the machine has."""
