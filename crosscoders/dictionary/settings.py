"""Shape and gate of a crosscoder, as a frozen dataclass. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError

# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class CrosscoderConfig:
    """Shape and gate of a crosscoder; n_models = 1 is a sparse autoencoder."""

    dict_size: int = 16_384
    """Number of latents."""
    activation: Literal["relu", "batchtopk", "jumprelu"] = "batchtopk"
    """relu: every positive latent is active. batchtopk: the k * batch largest of the batch are. jumprelu: those above a
    threshold of their own; read from others' files, not trained."""
    k: int | None = None
    """Active latents per token, batchtopk only."""
    code_norm: Literal["sum", "concat", "none"] = "sum"
    """Weight c_j of latent j in selection and in the L1 term: sum of its decoder norms over the models ("CC loss"),
    norm of the concatenated decoder ("SAE loss"), or 1."""
    n_models: int = 2
    """Models read: 2 = (base, tuned)."""
    d_model: int | None = None
    """Width of the activations; default: that of the cache."""

    def __post_init__(self) -> None:
        require_positive(self, "dict_size", "n_models")
        require_range(self, 1, None, "d_model")
        if self.activation == "batchtopk":
            if self.k is None:
                raise InputError(
                    "activation 'batchtopk' needs k, the active latents per token. Set crosscoder.k = 100."
                )
            if not 1 <= self.k <= self.dict_size:
                raise InputError(
                    f"crosscoder.k is {self.k}; it must lie between 1 and dict_size = {self.dict_size}. "
                    "Published runs use k = 100 of 73,728."
                )
        elif self.k is not None:
            raise InputError(
                f"crosscoder.k = {self.k} has no effect with activation {self.activation!r}. "
                "Set crosscoder.k to null, or use 'batchtopk'."
            )
