"""The inference threshold of a BatchTopK crosscoder, set from data so that L0 at inference equals k.

The threshold that training tracks remembers young models for thousands of steps; `threshold_for` looks at what the
model does now.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.dictionary.crosscoder import Crosscoder

MAX_TOKENS = 65_536
"""Tokens that are read at most: k of 100 is then known to 0.1%."""
KEPT_PER_TOKEN = 4
"""Largest values kept of a batch, in units of k times its tokens; more can matter only where one batch has four times
as many active latents as the others."""


def first_tokens(
    batches: Iterator[Float[Tensor, "_ n_models d_model"]],
) -> Iterator[Float[Tensor, "_ n_models d_model"]]:
    """Yield the batches that `threshold_for` reads, up to 65,536 tokens; `batches` then stands behind them."""
    n_tokens = 0
    while n_tokens < MAX_TOKENS and (x := next(batches, None)) is not None:
        n_tokens += len(x)
        yield x


@torch.no_grad()
def threshold_for(
    crosscoder: Crosscoder, batches: Iterable[Float[Tensor, "_ n_models d_model"]], k: int
) -> float | None:
    """Return the threshold t at which mean_n #{j: ReLU(pre_nj) c_j > t} = k, over the first 65,536 tokens of `batches`.

    t lies half way between the (k N)-th and the next largest ReLU(pre_nj) c_j of the N tokens, training space; 0 where
    fewer than k N of them are positive. None without tokens. Batches are in the units of x.
    """
    largest: list[Tensor] = []
    n_tokens = 0
    for x in batches:
        x = x[: MAX_TOKENS - n_tokens].to(crosscoder.b_enc.device).float()
        pre_acts = crosscoder.pre_acts(crosscoder.normalise(x))
        scaled = (pre_acts.relu_() * crosscoder.code_norm).flatten()
        candidates = scaled.topk(min(KEPT_PER_TOKEN * k * len(x), len(scaled)), sorted=False).values
        largest.append(candidates[candidates > 0])
        n_tokens += len(x)
        if n_tokens == MAX_TOKENS:
            break
    if not n_tokens:
        return None
    values = torch.cat(largest)
    if len(values) <= k * n_tokens:
        return 0.0
    following, last = values.topk(k * n_tokens + 1).values[[-1, -2]].tolist()
    return float((following + last) / 2)
