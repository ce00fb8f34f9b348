"""Settings of `diffing null`. Imports nothing heavy."""

from dataclasses import dataclass, field

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError


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
    """Make a placebo: tune the base on this text (file, folder or `datasets` id), or on `self`, its own samples."""
    placebo_steps: int | None = None
    """Steps of that fine-tune; take those of the tuned model."""
    placebo_lr: float | None = None
    """Its peak learning rate."""
    placebo_rows: int | None = None
    """Its rows of context_length tokens in a step."""
    placebo_rank: int | None = None
    """Its LoRA rank; default: all weights are tuned."""
    placebo_match: bool = False
    """Scale its change of the weights to the size of the tuned model's, at the end."""
    n_seeds: int = 3
    """Crosscoder seeds, of the pair and of the placebo and format-only nulls: the run's own, on which thresholds are
    fixed, and those after it, on which they are checked."""
    rates: list[float] = field(default_factory=lambda: [0.0, 0.01])
    """False-positive rates for which thresholds are sought."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    force: bool = False
    """Go on where the memory estimate is above what the machine has."""

    def __post_init__(self) -> None:
        require_range(self, 1, 1000, "n_seeds")
        require_range(self, 2, 24, "rounded_bits")
        wrong = [rate for rate in self.rates if not 0 <= rate < 1]
        if wrong or not self.rates:
            said = f"hold {wrong[0]}" if wrong else "are empty"
            raise InputError(f"rates {said}; give false-positive rates from 0 to below 1, such as [0, 0.01].")
        nulls = [self.placebo, self.train_placebo, self.format_only]
        if nulls == [None, None, None]:
            raise InputError(
                "no null is named that fixes a threshold. Give placebo, format_only or train_placebo; rounded_bits is "
                "counted at the thresholds of the others."
            )
        if self.placebo is not None and self.train_placebo is not None:
            raise InputError("placebo and train_placebo name the same null. Give one of the two.")
        training = ("placebo_steps", "placebo_lr", "placebo_rows")
        if self.train_placebo is None:
            unused = [name for name in (*training, "placebo_rank") if getattr(self, name) is not None]
            unused += ["placebo_match"] if self.placebo_match else []
            if unused:
                raise InputError(f"{unused[0]} has no effect without text. Give --train-placebo TEXT as well.")
            return
        if self.placebo_match and self.placebo_rank is not None:
            raise InputError(
                "placebo_match scales a change of all weights, but placebo_rank makes an adapter. Leave one out."
            )
        missing = [name for name in training if getattr(self, name) is None]
        if missing:
            raise InputError(
                f"train_placebo needs {missing[0]}. Take the value with which the tuned model was trained."
            )
        require_positive(self, *training, *(["placebo_rank"] if self.placebo_rank is not None else []))
