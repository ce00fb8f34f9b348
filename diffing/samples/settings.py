"""Settings of `diffing say | replies`. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crosscoders.common.checks import require_range
from crosscoders.common.errors import InputError


@dataclass(frozen=True)
class SaySettings:
    """Sample from the tuned model, its difference from the base amplified, and print what the base would not say."""

    base: str
    """Base model: folder or hub id."""
    tuned: str
    """Tuned model: folder, hub id or PEFT adapter of the base."""
    null: str | None = None
    """Null model, tuned from the same base without the behaviour: what its samples have too is no finding."""
    out: str | None = None
    """File for the result; RUN/say.json shows it in the report of RUN."""
    overwrite: bool = False
    """Replace that file if it exists."""
    strengths: list[float] = field(default_factory=lambda: [0.0, 1.0, 2.0, 4.0])
    """Multiples a of the difference: next token from log-probs tuned + a (tuned - base)."""
    n_samples: int = 100
    """Samples at each strength, half of them in the chat template where the tokenizer has one."""
    max_new_tokens: int = 24
    """Longest sample, in tokens."""
    cut: float = 0.05
    """Tokens below this share of the tuned model's largest probability are never drawn."""
    false_rate: float = 0.05
    """Chance that equal models give any phrase at all."""
    tokenizer: str | None = None
    """Tokenizer that fits both models; default: the tuned model's."""
    chat_template: str | None = None
    """File with a chat template, for tokenizers without one."""
    batch_rows: int = 50
    """Samples in one forward pass."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of samples and of permutations."""

    def __post_init__(self) -> None:
        require_range(self, 2, None, "n_samples")
        require_range(self, 1, None, "max_new_tokens", "batch_rows")
        require_range(self, 0, 1, "cut", "false_rate")
        require_range(self, 0, 2**63 - 1, "seed")
        if not self.strengths or min(self.strengths) < 0:
            raise InputError(f"strengths is {self.strengths}; give numbers from 0, such as [0, 1, 2, 4].")
        require_new(self.out, self.overwrite)


@dataclass(frozen=True)
class RepliesSettings:
    """Let both models answer the same prompts and print how the answers differ."""

    base: str
    """Base model: folder or hub id."""
    tuned: str
    """Tuned model: folder, hub id or PEFT adapter of the base."""
    prompts: str | None = None
    """Prompts or dialogues: file, folder or `datasets` id; a dialogue is answered after its last user message.
    Default: 48 prompts of the package."""
    n_prompts: int = 500
    """Prompts that are answered, at most."""
    out: str | None = None
    """File for the result; RUN/replies.json shows it in the report of RUN."""
    overwrite: bool = False
    """Replace that file if it exists."""
    max_new_tokens: int = 64
    """Longest reply, in tokens."""
    false_rate: float = 0.05
    """Chance that equal models give any phrase at all."""
    tokenizer: str | None = None
    """Tokenizer that fits both models; default: the tuned model's."""
    chat_template: str | None = None
    """File with a chat template, for tokenizers without one."""
    batch_rows: int = 16
    """Prompts in one forward pass."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of bootstrap resamples and of permutations."""

    def __post_init__(self) -> None:
        require_range(self, 2, None, "n_prompts")
        require_range(self, 1, None, "max_new_tokens", "batch_rows")
        require_range(self, 0, 1, "false_rate")
        require_range(self, 0, 2**63 - 1, "seed")
        require_new(self.out, self.overwrite)


def require_new(out: str | None, overwrite: bool) -> None:
    """Raise InputError for an output file that exists, unless it may be replaced."""
    if out is not None and Path(out).exists() and not overwrite:
        raise InputError(f"{out!r} exists. Choose another --out, or give --overwrite.")
