"""How near pieces are to what was planted: cosines of distinct picks, norm ratios, pieces alive, SVD beside it."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from diffing.decomposition.sites import Site


class Match(NamedTuple):
    """Planted against found, each planted one with another piece."""

    cosines: list[float]
    norm_ratios: list[float]
    """Norm of the found over that of the planted."""
    picks: list[int]
    """Number of the piece of each planted one."""


def outer(site: Site) -> Float[Tensor, "components d_out d_in"]:
    """Return the pieces as matrices."""
    V, U = site.pieces()
    return torch.einsum("ic,co->coi", V, U)


def matched(found: Float[Tensor, "found ..."], planted: Float[Tensor, "planted ..."]) -> Match:
    """Return the pairing of distinct pieces with the largest sum of cosines; fewer found than planted count as 0."""
    a, b = planted.flatten(1), found.flatten(1)
    cosines = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T
    padded = functional.pad(cosines, (0, max(0, len(a) - len(b))))
    rows, columns = linear_sum_assignment(-padded.numpy())
    ratios = [
        float(b[column].norm() / a[row].norm()) if column < len(b) else 0.0
        for row, column in zip(rows, columns, strict=True)
    ]
    return Match([float(padded[r, c]) for r, c in zip(rows, columns, strict=True)], ratios, columns.tolist())


def column_match(site: Site, alive: list[int], weight: Float[Tensor, "d_out d_in"], features: list[int]) -> Match:
    """Return, for chosen columns of a weight, the distinct alive pieces whose own column is nearest in direction.

    The published MMCS takes the largest cosine over all pieces; a dead one of norm .01 can then be picked.
    """
    pieces = outer(site)[alive]
    cosines = torch.stack([functional.cosine_similarity(pieces[:, :, j], weight[:, j][None], dim=1) for j in features])
    padded = functional.pad(cosines, (0, max(0, len(features) - len(alive))))
    rows, columns = linear_sum_assignment(-padded.numpy())
    ratios = [
        float(pieces[c, :, features[r]].norm() / weight[:, features[r]].norm()) if c < len(alive) else 0.0
        for r, c in zip(rows, columns, strict=True)
    ]
    picks = [alive[c] if c < len(alive) else -1 for c in columns]
    return Match([float(padded[r, c]) for r, c in zip(rows, columns, strict=True)], ratios, picks)


def svd_pieces(change: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "pieces d_out d_in"]:
    """Return the singular pieces of a change, largest first."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return torch.einsum("op,p,pi->poi", u, s, vh)


def overlap(found: Float[Tensor, "found ..."], planted: Float[Tensor, "planted ..."], rank: int) -> float:
    """Return ||P Q^T||_F^2 / rank of the spaces that the largest `rank` singular directions of both span."""
    spaces = [torch.linalg.svd(part.flatten(1), full_matrices=False).Vh[:rank] for part in (found, planted)]
    return float((spaces[0] @ spaces[1].T).square().sum() / rank)
