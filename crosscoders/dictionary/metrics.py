r"""How good a dictionary is: one definition each, as sums over the whole evaluation set that are divided once.

`ReconstructionSums` collects, `evaluate` runs it over batches; `log_probs`, `ce` and `kl` are what is lost in a model's
predictions. Definitions in docs/math.md, section "Metrics".
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder


class Evaluation(NamedTuple):
    """Metrics of one evaluation set."""

    fve: list[float]
    """Fraction of variance explained, per model: 1 - sum(err^2) / sum((x - mean x)^2)."""
    l0: float
    """Mean active latents per token."""
    dead_fraction: float
    """Share of latents that were active on no token of the set."""
    n_tokens: int


class ReconstructionSums:
    """Collect sums in float64 over all tokens added so far."""

    def __init__(self, n_models: int, d_model: int, dict_size: int) -> None:
        self.n_tokens = 0
        self.n_active = torch.zeros(dict_size, dtype=torch.int64)
        self.err_square = torch.zeros(n_models, dtype=torch.float64)
        self.x_square = torch.zeros(n_models, dtype=torch.float64)
        self.x_sum = torch.zeros(n_models, d_model, dtype=torch.float64)

    def add(
        self,
        x: Float[Tensor, "batch n_models d_model"],
        x_hat: Float[Tensor, "batch n_models d_model"],
        n_active: Int[Tensor, " dict_size"],
    ) -> None:
        """Add a batch: activations, reconstructions, and on how many of its tokens each latent was active."""
        self.n_tokens += len(x)
        self.n_active += n_active.cpu()
        self.err_square += (x - x_hat).double().pow(2).sum(dim=(0, 2)).cpu()
        self.x_square += x.double().pow(2).sum(dim=(0, 2)).cpu()
        self.x_sum += x.double().sum(dim=0).cpu()

    def result(self) -> Evaluation:
        """Divide the sums, once.

        Raises:
            InputError: nothing was added.
        """
        if not self.n_tokens:
            raise InputError("no tokens to evaluate on. Give a cache with at least one token.")
        variance = self.x_square - self.x_sum.pow(2).sum(dim=1) / self.n_tokens
        return Evaluation(
            fve=(1 - self.err_square / variance).tolist(),
            l0=float(self.n_active.sum()) / self.n_tokens,
            dead_fraction=float((self.n_active == 0).double().mean()),
            n_tokens=self.n_tokens,
        )


@torch.no_grad()
def evaluate(crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ n_models d_model"]]) -> Evaluation:
    """Return FVE, L0 and dead fraction with the inference gate, over all tokens of `batches`."""
    config = crosscoder.config
    sums = ReconstructionSums(config.n_models, int(crosscoder.W_enc.shape[1]), config.dict_size)
    for x in batches:
        x = x.to(crosscoder.b_enc.device).float()
        latents = crosscoder.encode(x)
        sums.add(x, crosscoder.decode(latents), (latents > 0).sum(dim=0))
    evaluation = sums.result()
    if not all(map(math.isfinite, evaluation.fve)):
        raise InputError(
            f"activations do not vary over the {evaluation.n_tokens} tokens to evaluate on. Give more tokens."
        )
    return evaluation
