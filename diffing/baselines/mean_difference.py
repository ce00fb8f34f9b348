"""Activation Difference Lens: the mean difference at each of the first positions, read as tokens.

Source: Minder et al. 2025, "Narrow finetuning leaves clearly readable traces". Differs: the logit lens only, no
Patchscope and no steering; positions are counted after the first of a row, which is mostly the beginning of sequence.
"""

from typing import Any, NamedTuple

import torch

from crosscoders.common.errors import InputError
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import read_out
from crosscoders.text.decoding import token_text
from diffing.baselines.observation import Observed, first_positions


class Lens(NamedTuple):
    """What one mean difference writes for."""

    position: int
    """Counted from 1 after the first of a row; 0: the mean over all tokens."""
    norm: float
    """Length of the mean difference, in units of the activations."""
    n_tokens: int
    tokens: list[str]
    """Those of largest logit, the largest first."""


def difference_lens(pair: ModelPair, observed: Observed, *, n_positions: int = 5, top: int = 20) -> list[Lens]:
    """Return the lens of the mean over all tokens, then of each of the first positions, with the tuned model's head.

    Raises:
        InputError: a first position has no token.
    """
    places = [torch.arange(len(observed.kl)), *map(torch.from_numpy, first_positions(observed, n_positions))]
    empty = next((number for number, place in enumerate(places) if not len(place)), None)
    if empty is not None:
        raise InputError(f"no document has a token at position {empty}. Give longer documents, or fewer positions.")
    means = torch.stack([observed.delta[place].mean(dim=0) for place in places])
    model: Any = pair.models[1]
    weight = next(model.parameters())
    logits = read_out(model, means.to(weight.device, weight.dtype))[:, : min(pair.info.n_ids, len(pair.info.tokenizer))]
    return [
        Lens(number, float(mean.norm()), len(place), [token_text(pair.info.tokenizer, int(i)) for i in best])
        for number, (mean, place, best) in enumerate(zip(means, places, logits.topk(top).indices, strict=True))
    ]
