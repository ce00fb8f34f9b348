"""Settings of `diffing scale | stability`."""

from dataclasses import dataclass

from crosscoders.common.checks import require_range


@dataclass(frozen=True)
class ScaleSettings:
    """Latent Scaling, verdicts and examples for every latent of a run."""

    run: str
    """Run folder of `crosscoders train`."""
    cache: str | None = None
    """Folder of `crosscoders cache`; default: the one that the run was trained on."""
    n_tokens: int | None = None
    """Tokens to read; default: all."""
    n_examples: int = 512
    """Latents, from the most tuned-specific on, for which examples are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "n_tokens", "n_examples")


@dataclass(frozen=True)
class StabilitySettings:
    """Which latents come back in other training runs of the same pair."""

    runs: list[str]
    """Two or more run folders, after `diffing scale`."""
    seed: int = 0
    """Seed of the permuted control."""
