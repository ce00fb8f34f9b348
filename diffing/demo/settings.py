"""Settings of `diffing demo`."""

from dataclasses import dataclass

from crosscoders.common.checks import require_range


@dataclass(frozen=True)
class DemoSettings:
    """The whole path on the embedded pair of models: cache, train, scale, report."""

    out: str = "runs/demo"
    """Folder for the caches, the run and the report."""
    n_tokens: int = 250_000
    """Tokens in the cache, half raw text, half dialogues; training reads them in several epochs."""
    seed: int = 0
    """Seed of data order and weights."""
    null_seeds: int = 0
    """Crosscoder seeds with which counts are calibrated on the embedded null models (one takes about two minutes,
    three about eight); 0: no calibration."""

    def __post_init__(self) -> None:
        require_range(self, 0, 1000, "null_seeds")
        require_range(self, 10_000, None, "n_tokens")
        require_range(self, 0, 2**63 - 1, "seed")
