"""Settings of `sae-lora finetune-sae`. Imports nothing heavy."""

from dataclasses import dataclass, field

from crosscoders.common.checks import require_positive, require_range
from sae_lora.fitting.settings import TextConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneSaeSettings(TextConfig):
    """Go on training an SAE to reconstruct the activations of another model: a twin with the same latent numbers."""

    model: str
    """The tuned model: local folder or hub id, weights merged."""
    sae: str
    """SAE of the base model to start from: a folder, a file, or RELEASE/ID of SAELens's list."""
    hook_point: str | None = None
    """Where it belongs, if its files do not say it."""
    out: str
    """Folder of the twin, in SAELens's layout."""
    n_tokens: int = field(default=2_000_000)
    """Scored tokens to read, once. Short: with many the numbers keep less of their meaning."""
    batch_tokens: int = 1024
    """Tokens in one step."""
    buffer_tokens: int = 65_536
    """Tokens among which activations are shuffled."""
    lr: float = 3e-4
    """Learning rate of Adam; it falls linearly to 0 over the last fifth."""
    overwrite: bool = False
    """Replace what is in `out`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr")
        require_range(self, 1, None, "batch_tokens", "buffer_tokens")
