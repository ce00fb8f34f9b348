r"""How good a dictionary is: one definition each, as sums over the whole evaluation set that are divided once.

`ReconstructionSums` collects, with `NormSums` for the tokens of ordinary norm, and `evaluate` runs it over batches;
`log_probs`, `ce` and `kl` are what is lost in a model's predictions. Definitions in docs/math.md, section "Metrics".
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder

REST_STEPS = 9
"""Quarter octaves above the median norm up to which a token is ordinary: from 4.8 to 5.7 times the median norm."""


class Evaluation(NamedTuple):
    """Metrics of one evaluation set."""

    fve: list[float]
    """Fraction of variance explained, per model: 1 - sum(err^2) / sum((x - mean x)^2)."""
    l0: float
    """Mean active latents per token."""
    dead_fraction: float
    """Share of latents that were active on no token of the set."""
    n_tokens: int
    fve_rest: list[float]
    """FVE on the tokens of ordinary norm alone, per model."""
    n_rest: list[int]
    """How many these are, per model."""


class NormSums:
    """Sums in float64 over the tokens of one model, apart for each quarter octave of the norm of x."""

    def __init__(self) -> None:
        self.by_step: dict[int, Float[Tensor, " d_model_and_three"]] = {}

    def add(
        self,
        x: Float[Tensor, "batch d_model"],
        square: Float[Tensor, " batch"],
        err_square: Float[Tensor, " batch"],
    ) -> None:
        """Add a batch: activations, ||x||^2 and ||err||^2."""
        steps, of_step = norm_steps(square).unique(return_inverse=True)
        terms = torch.cat([torch.stack([torch.ones_like(square), square, err_square], dim=1), x], dim=1)
        sums = torch.zeros(len(steps), terms.shape[1], dtype=torch.float64, device=x.device)
        for step, sum_of_step in zip(steps.tolist(), sums.index_add_(0, of_step, terms).cpu(), strict=True):
            self.by_step[step] = self.by_step[step] + sum_of_step if step in self.by_step else sum_of_step

    def rest(self) -> tuple[float, int]:
        """Return the FVE on the tokens up to `REST_STEPS` above the step of the median norm, and their number."""
        steps = sorted(self.by_step)
        counts = torch.stack([self.by_step[step][0] for step in steps]).cumsum(dim=0)
        median = steps[int(torch.searchsorted(counts, counts[-1] / 2))]
        total = torch.stack([self.by_step[step] for step in steps if step <= median + REST_STEPS]).sum(dim=0)
        n, square, err_square = total[:3]
        return float(1 - err_square / (square - total[3:].square().sum() / n)), int(n)


def norm_steps(square: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Return floor(4 log2 ||x||) of ||x||^2, the number of a quarter octave."""
    return (2 * square.clamp_min(1e-300).log2()).floor().long()


class ReconstructionSums:
    """Collect sums in float64 over all tokens added so far."""

    def __init__(self, n_models: int, d_model: int, dict_size: int) -> None:
        self.n_tokens = 0
        self.n_active = torch.zeros(dict_size, dtype=torch.int64)
        self.err_square = torch.zeros(n_models, dtype=torch.float64)
        self.x_square = torch.zeros(n_models, dtype=torch.float64)
        self.x_sum = torch.zeros(n_models, d_model, dtype=torch.float64)
        self.by_norm = [NormSums() for _ in range(n_models)]

    def add(
        self,
        x: Float[Tensor, "batch n_models d_model"],
        x_hat: Float[Tensor, "batch n_models d_model"],
        n_active: Int[Tensor, " dict_size"],
    ) -> None:
        """Add a batch: activations, reconstructions, and on how many of its tokens each latent was active."""
        self.n_tokens += len(x)
        self.n_active += n_active.cpu()
        err_square = (x - x_hat).double().pow(2)
        self.err_square += err_square.sum(dim=(0, 2)).cpu()
        x = x.double()
        x_square = x.pow(2)
        self.x_square += x_square.sum(dim=(0, 2)).cpu()
        self.x_sum += x.sum(dim=0).cpu()
        for m, sums in enumerate(self.by_norm):
            if len(x):
                sums.add(x[:, m], x_square[:, m].sum(dim=1), err_square[:, m].sum(dim=1))

    def result(self) -> Evaluation:
        """Divide the sums, once.

        Raises:
            InputError: nothing was added.
        """
        if not self.n_tokens:
            raise InputError("no tokens to evaluate on. Give a cache with at least one token.")
        variance = self.x_square - self.x_sum.pow(2).sum(dim=1) / self.n_tokens
        rest = [sums.rest() for sums in self.by_norm]
        return Evaluation(
            fve=(1 - self.err_square / variance).tolist(),
            l0=float(self.n_active.sum()) / self.n_tokens,
            dead_fraction=float((self.n_active == 0).double().mean()),
            n_tokens=self.n_tokens,
            fve_rest=[value for value, _ in rest],
            n_rest=[n for _, n in rest],
        )


@torch.no_grad()
def evaluate(crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ n_models d_model"]]) -> Evaluation:
    """Return FVE, FVE on tokens of ordinary norm, L0 and dead fraction over all `batches`, with the inference gate."""
    config = crosscoder.config
    sums = ReconstructionSums(config.n_models, int(crosscoder.W_enc.shape[1]), config.dict_size)
    for x in batches:
        x = x.to(crosscoder.b_enc.device).float()
        latents = crosscoder.encode(x)
        sums.add(x, crosscoder.decode(latents), (latents > 0).sum(dim=0))
    evaluation = sums.result()
    if not all(map(math.isfinite, [*evaluation.fve, *evaluation.fve_rest])):
        raise InputError(
            f"activations do not vary over the {evaluation.n_tokens} tokens to evaluate on. Give more tokens."
        )
    return evaluation
