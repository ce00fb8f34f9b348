"""Principal directions of the difference of activations, and its mean."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from crosscoders.common.errors import InputError
from diffing.baselines.directions import Directions


def principal_directions(delta: Float[Tensor, "tokens d_model"], n: int) -> Directions:
    """Return the first `n` principal directions of centred differences; scores are shares of their variance.

    Raises:
        InputError: fewer tokens than directions and one.
    """
    if len(delta) < n + 1:
        raise InputError(f"{n} principal directions need at least {n + 1} tokens; got {len(delta)}. Raise --n-tokens.")
    centred = (delta - delta.mean(dim=0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    order = values.argsort(descending=True)[:n]
    return Directions("pca", vectors[:, order].T.float(), (values[order] / values.sum()).float())


def mean_direction(delta: Float[Tensor, "tokens d_model"]) -> Directions:
    """Return the direction of the mean difference; its score is the share of the mean square that the mean makes up.

    Raises:
        InputError: there is no token.
    """
    if not len(delta):
        raise InputError("a mean difference needs tokens; got none. Raise --n-tokens.")
    mean = delta.double().mean(dim=0)
    share = mean.square().sum() / delta.double().square().sum(dim=1).mean()
    return Directions("mean-difference", normalize(mean, dim=0)[None].float(), share[None].float())
