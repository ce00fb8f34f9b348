"""Settings of `diffing sae-gap`. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from crosscoders.common.checks import require_positive
from crosscoders.text.settings import DataSource
from sae_lora.dictionaries.settings import ControlKind
from sae_lora.fitting.settings import FitConfig, TextConfig


@dataclass(frozen=True, kw_only=True)
class SaeGapSettings(TextConfig):
    """Splice one dictionary into base and tuned model, fit LoRA around it in each, and compare what is left."""

    base: str
    """Local folder or hub id."""
    tuned: str
    """Local folder or hub id of the tuned model, weights merged."""
    placebo: str | None = None
    """Control: the base, tuned as long on raw text only. Not with a crosscoder, which has no side for it."""
    dictionary: str
    """SAE of the base model, spliced into every model; or a crosscoder of the pair, whose base side goes into the base
    and whose tuned side into the tuned model."""
    hook_point: str | None = None
    """Where the dictionary belongs, if its files do not say it."""
    heldout: str | list[str | DataSource]
    """Documents that the gaps are measured on."""
    eval_tokens: int = 50_000
    """Scored tokens of them."""
    control: ControlKind = "none"
    """As in `sae-lora fit`; `no-latents` shows what LoRA makes up for without knowing anything of the token."""
    layers: Literal["after", "all"] | list[int] = "after"
    """Layers that get LoRA, as in `sae-lora fit`."""
    rank: int = 64
    """Rank of each LoRA."""
    alpha: float | None = None
    """As in `sae-lora fit`."""
    lr: float = 5e-5
    """Learning rate of AdamW."""
    out: str
    """Folder: a fit for each model, and sae-gap.json; interrupted fits go on."""
    force: bool = False
    """Go on where the estimate of memory is above what the machine has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "eval_tokens")
        self.fit_config(self.base)  # its own checks

    def text(self) -> dict[str, object]:
        """Return the settings of TextConfig, with the tuned model's tokenizer for all models."""
        settings: dict[str, object] = {name: getattr(self, name) for name in TextConfig.__dataclass_fields__}
        return {**settings, "tokenizer": self.tokenizer or self.tuned}

    def fit_config(self, model: str, **changes: object) -> FitConfig:
        """Return the settings of `sae-lora fit` for one of the models."""
        shared = ("dictionary", "hook_point", "control", "layers", "rank", "alpha", "lr")
        return FitConfig(model=model, **{**self.text(), **{name: getattr(self, name) for name in shared}, **changes})

    def eval_config(self) -> TextConfig:
        """Return how the documents that are measured are read: as those of the fits."""
        changed = {"data": self.heldout, "n_tokens": self.eval_tokens}
        return TextConfig(**{**self.text(), **changed})  # type: ignore[arg-type]
