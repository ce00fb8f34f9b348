"""Whether pieces come back with another seed, and which of them are on together.

The cosine of two rank-one pieces is cos(v, v') cos(u, u'), so no piece is ever made into a matrix, and the signs of
u and v cancel.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from diffing.decomposition.baselines import Pieces

CUT = 0.5
"""Pieces that are together above it are one cluster."""


class Similarity(NamedTuple):
    """Say how near the pieces of one decomposition are to those of another, as means over pieces."""

    cosine: float
    """Largest cosine of each piece to one of the other at its site."""
    null: float
    """The same, with the other's v and u paired at random within each site."""
    n_pieces: int


def cosines(
    first: tuple[Float[Tensor, "d_in a"], Float[Tensor, "a d_out"]],
    second: tuple[Float[Tensor, "d_in b"], Float[Tensor, "b d_out"]],
) -> Float[Tensor, "a b"]:
    """Return the cosines of all pairs of pieces."""
    reads = functional.normalize(first[0], dim=0).T @ functional.normalize(second[0], dim=0)
    return reads * (functional.normalize(first[1], dim=1) @ functional.normalize(second[1], dim=1).T)


def similarity(first: Pieces, second: Pieces, *, seed: int = 0) -> Similarity:
    """Return how far the pieces of `first` are found in `second`; give alive pieces alone.

    A site where the second has none counts as 0.
    """
    generator = torch.Generator().manual_seed(seed)
    own, null = [], []
    for name, (V, U) in first.items():
        other_V, other_U = second.get(name, (V[:, :0], U[:0]))
        if other_V.shape[1] == 0:
            own.append(torch.zeros(V.shape[1]))
            null.append(torch.zeros(V.shape[1]))
            continue
        shuffled = torch.randperm(other_V.shape[1], generator=generator)
        own.append(cosines((V, U), (other_V, other_U)).amax(dim=1))
        null.append(cosines((V, U), (other_V, other_U[shuffled])).amax(dim=1))
    cosine, chance = (torch.cat(part) for part in (own, null))
    return Similarity(float(cosine.mean()), float(chance.mean()), len(cosine))


def clusters(importances: Float[np.ndarray, "tokens pieces"], *, cut: float = CUT) -> Int[np.ndarray, " pieces"]:
    """Return a cluster number of each piece, from 0: average linkage on 1 - `together`."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if importances.shape[1] < 2:
        return np.zeros(importances.shape[1], dtype=np.int64)
    distance = 1 - together(importances)
    np.fill_diagonal(distance, 0)
    numbers = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - cut, "distance")
    return np.asarray(numbers, dtype=np.int64) - 1


def together(importances: Float[np.ndarray, "tokens pieces"]) -> Float[np.ndarray, "pieces pieces"]:
    """Return sum_t min(g_a, g_b) / sum_t max(g_a, g_b): 1 for pieces that are always on together, the whole run long
    too, where a correlation is not defined."""
    sums = importances.sum(axis=0, dtype=np.float64)
    shared = np.stack([np.minimum(importances, of[:, None]).sum(axis=0, dtype=np.float64) for of in importances.T])
    either = sums + sums[:, None] - shared
    return np.asarray(np.where(either > 0, shared / np.where(either > 0, either, 1), 0))


def chosen_pieces(pieces: Pieces, chosen: Mapping[str, list[int]]) -> Pieces:
    """Return some of the pieces; sites without any are left out."""
    return {name: (V[:, chosen[name]], U[chosen[name]]) for name, (V, U) in pieces.items() if chosen.get(name)}
