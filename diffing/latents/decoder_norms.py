r"""What decoder norms and directions alone say about a latent: class, cosine and difference.

relative_decoder_norm   `Crosscoder.relative_decoder_norm`
norm_class              base-only [0, 0.1], shared [0.4, 0.6], tuned-only [0.9, 1], other
decoder_cosine          cos(d_base, d_tuned)
joint_directions        [d_base; d_tuned] as a unit vector, by which latents are matched
decoder_difference      ||D_tuned - D_base||, in the units of x
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.dictionary.crosscoder import Crosscoder

BASE_ONLY, SHARED, TUNED_ONLY = 0.1, (0.4, 0.6), 0.9
"""Bounds of the published classes: Minder et al. 2025, arXiv 2504.02922."""
NORM_CLASSES = ("base-only", "shared", "tuned-only", "other")


def norm_class(relative_decoder_norm: Sequence[float]) -> list[str]:
    """Return the published class of each latent."""

    def name(value: float) -> str:
        if value <= BASE_ONLY:
            return "base-only"
        if value >= TUNED_ONLY:
            return "tuned-only"
        return "shared" if SHARED[0] <= value <= SHARED[1] else "other"

    return [name(value) for value in relative_decoder_norm]


def decoder_cosine(crosscoder: Crosscoder) -> Float[Tensor, " dict_size"]:
    """Return the cosine of the base and the tuned decoder of each latent; 0 where one of them is 0.

    Near 1: one concept in one place. Near 0 with both norms alive: the latent joins two unrelated directions
    ("rotated"), which also makes the ratios of Latent Scaling small without anything being new.
    """
    cosines = [  # of some latents at a time: the function copies what it is given
        torch.nn.functional.cosine_similarity(part[:, 0], part[:, 1], dim=1, eps=1e-12)
        for part in crosscoder.decoder().split(4096)
    ]
    return torch.cat(cosines)


def joint_directions(crosscoder: Crosscoder, latents: Int[np.ndarray, " n"]) -> Float[Tensor, "n decoders"]:
    """Return [d_base; d_tuned] of some latents, the two decoders end to end in training space, as unit vectors."""
    decoder = crosscoder.decoder().detach().flatten(1)
    return torch.nn.functional.normalize(decoder[torch.from_numpy(latents).to(decoder.device)], dim=1)


def decoder_difference(crosscoder: Crosscoder) -> Float[Tensor, " dict_size"]:
    """Return ||D_tuned - D_base|| of each latent, in the units of x: how far one unit of the latent moves an activation
    when the models are exchanged. It needs no data."""
    base, tuned = (crosscoder.decoder().detach() / crosscoder.input_scale[:, None]).unbind(dim=1)
    return (tuned - base).norm(dim=1)
