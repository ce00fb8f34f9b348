"""Settings of TopKLoRA. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError

Gate = Literal["none", "relu", "topk", "batchtopk"]
Estimator = Literal["plain", "straight-through"]


@dataclass(frozen=True)
class TopKLoRAConfig:
    """Shape of a TopKLoRA."""

    rank: int = 64
    """Directions at each adapted module."""
    k: int | None = 8
    """Directions that a token may use at each module; None: all (gates `none` and `relu`)."""
    gate: Gate = "topk"
    """none (plain LoRA), relu, topk (per token) or batchtopk."""
    alpha: float | None = None
    """Deltas are scaled by alpha / rank; default: 2 rank."""
    layers: list[int] | None = None
    """Decoder layers whose linear maps are adapted; default: all."""
    modules: list[str] | None = None
    """Last parts of the names of linear maps, such as q_proj; default: all. `mlp`: a sparse branch beside the MLP,
    MLP(x) + s B gate(A x)."""
    embedding: bool = False
    """Also the embedding, and the head where it is tied to it."""
    k_start_factor: float = 2.0
    """k begins at this multiple and falls linearly to k ..."""
    k_warmup_fraction: float = 0.2
    """... over this share of the steps."""
    estimator: Estimator = "plain"
    """Gradient of the selection: plain, or straight-through for reproduction."""
    temperature: float = 0.1
    """Of the straight-through estimator."""
    seed: int = 0
    """Of the first weights."""

    def __post_init__(self) -> None:
        require_positive(self, "rank", "temperature", "k_start_factor")
        require_range(self, 0, 1, "k_warmup_fraction")
        sparse = self.gate in ("topk", "batchtopk")
        if sparse and self.k is None:
            raise InputError(f"gate {self.gate} needs k, the directions that a token may use. Give k, or gate relu.")
        if not sparse and self.k is not None:
            raise InputError(f"k has no effect with gate {self.gate}. Leave k out, or give gate topk.")
        if self.k is not None and not 1 <= self.k <= self.rank:
            raise InputError(f"k is {self.k} but rank is {self.rank}. Give a k from 1 to {self.rank}.")

    def k_at(self, fraction: float) -> int | None:
        """Return k after a share of the training steps."""
        if self.k is None or fraction >= self.k_warmup_fraction:
            return self.k
        start = min(self.k_start_factor * self.k, self.rank)
        return round(start + (self.k - start) * fraction / self.k_warmup_fraction)
