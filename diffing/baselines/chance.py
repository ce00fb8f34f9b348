"""What chance gives in place of directions or tokens: random directions, covariance-matched ones, permuted tokens.

Each takes a generator, so that one seed gives one null; `alignment_rows` puts a figure beside its nulls.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from crosscoders.common.results import row
from diffing.baselines.geometry import max_cosine, one_to_one, principal_angles

CUTS = (0.5, 0.7, 0.9)
"""Cosines above which shares are counted."""


def random_directions(n: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "n d_model"]:
    """Return unit vectors, uniform on the sphere."""
    return normalize(torch.randn(n, d_model, generator=generator), dim=1)


def matched_directions(
    x: Float[Tensor, "tokens d_model"], n: int, generator: torch.Generator
) -> Float[Tensor, "n d_model"]:
    """Return unit vectors drawn from a Gaussian with the covariance of `x`."""
    centred = (x - x.mean(dim=0)).float()
    _, values, basis = torch.linalg.svd(centred, full_matrices=False)
    drawn = torch.randn(n, len(values), generator=generator) * values
    return normalize(drawn @ basis, dim=1)


def permuted_tokens(n_tokens: int, generator: torch.Generator) -> Int[Tensor, " tokens"]:
    """Return an order of tokens in which none keeps its place: a random cycle through all of them."""
    order = torch.randperm(n_tokens, generator=generator)
    shifted = torch.empty_like(order)
    shifted[order] = order.roll(1)
    return shifted


def alignment_rows(
    name: str,
    one: Float[Tensor, "rows d_model"],
    other: Float[Tensor, "candidates d_model"],
    x: Float[Tensor, "tokens d_model"],
    *,
    n_angles: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return rows NAME.<figure> of `one` against `other`, and NAME.<null>.<figure> of what chance gives in its place.

    x: activations whose covariance the matched null has; n_angles: leading rows of both that span the subspaces.
    """
    generator = torch.Generator().manual_seed(seed)
    width = one.shape[1]
    candidates = {
        name: one,
        f"{name}.random": random_directions(len(one), width, generator),
        f"{name}.matched": matched_directions(x, len(one), generator),
    }
    rows = []
    for which, directions in candidates.items():
        for word, values in (
            ("max_cosine", max_cosine(directions, other)),
            ("max_abs_cosine", max_cosine(directions, other, absolute=True)),
            ("one_to_one", one_to_one(directions, other)),
        ):
            rows.append(row(f"{which}.{word}", float(values.mean()), "cosine", len(values)))
            if word != "max_cosine":
                rows += [
                    row(f"{which}.{word}_above_{cut}", float((values > cut).float().mean()), "fraction", len(values))
                    for cut in CUTS
                ]
        n = min(n_angles, len(directions), len(other), width)
        angles = principal_angles(directions[:n], other[:n])
        rows.append(row(f"{which}.angle_mean", float(angles.mean()), "degrees", n))
        rows.append(row(f"{which}.angle_min", float(angles.min()), "degrees", n))
    return rows
