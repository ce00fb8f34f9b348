"""Settings of `diffing causal | steer | lens`."""

from dataclasses import dataclass, field
from typing import Literal

from crosscoders.common.checks import LEAST_CHATS, require_range
from crosscoders.common.errors import InputError


@dataclass(frozen=True)
class CausalSettings:
    """Patch chosen latents from one model into the other and measure how far its predictions follow."""

    run: str
    """Run folder, after `diffing scale`."""
    cache: str | None = None
    """Folder of `crosscoders cache`, whose models and chats are used; best one of held-out documents. Default: the one
    that the run was trained on."""
    data: str | None = None
    """Other chats: file, folder or `datasets` id with a messages column."""
    n_documents: int = 512
    """Chats with a response to measure on, at least 20; below 60 the intervals are too narrow."""
    n_latents: int | list[int] = 32
    """Sizes of the sets by Latent Scaling, by norm, decoder difference and cosine, and at random."""
    random_draws: int = 10
    """Random sets of each size, from latents that are alive."""
    match_frequency: bool = False
    """Draw random latents that are as frequent as those chosen by Latent Scaling."""
    latents: list[int] | None = None
    """A set of your own."""
    first_tokens: int = 9
    """Tokens of each response that are also counted apart."""
    batch_rows: int = 8
    """Chats in one forward pass."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of random sets and of bootstrap resamples."""

    def __post_init__(self) -> None:
        require_range(self, LEAST_CHATS, None, "n_documents")
        require_range(self, 1, None, "random_draws", "first_tokens", "batch_rows")
        require_range(self, 0, 2**63 - 1, "seed")

    def top(self) -> list[int]:
        """Return n_latents as a list."""
        return [self.n_latents] if isinstance(self.n_latents, int) else self.n_latents


@dataclass(frozen=True)
class SteerSettings:
    """Add a latent's decoder to a model while it answers."""

    run: str
    """Run folder, after `diffing scale`."""
    latent: int
    """Number of the latent."""
    prompt: str
    """User message, or text to go on with where the models have no chat template."""
    cache: str | None = None
    """Folder of `crosscoders cache`, whose models are used. Default: the one that the run was trained on."""
    strengths: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Strengths, in units of the latent's largest activation in the table; 0 changes nothing."""
    decoder: Literal["base", "tuned"] = "tuned"
    """Whose decoder is added."""
    model: Literal["base", "tuned"] = "base"
    """Which model answers."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "max_new_tokens")
        if not self.strengths:
            raise InputError("strengths is an empty list. Name at least one, such as 1.0.")


@dataclass(frozen=True)
class LensSettings:
    """The tokens that decoders write for, read with each model's final norm and unembedding."""

    run: str
    """Run folder, after `diffing scale`."""
    cache: str | None = None
    """Folder of `crosscoders cache`, whose models are used. Default: the one that the run was trained on."""
    latents: list[int] | None = None
    """Latents to read; default: the first 32 by rank."""
    top: int = 8
    """Tokens for each decoder."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "top")
