r"""How much methods say the same: spans of directions, and scores of the same tokens.

overlap of two spans of n and m directions    ||Q^T P||_F^2 / min(n, m);  by chance max(n, m) / d_model
overlap of two scores                         Spearman's rank correlation over tokens
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.results import row
from diffing.baselines.directions import Directions
from diffing.comparison.score_block import Scores


def span_overlap(one: Float[Tensor, "n d_model"], other: Float[Tensor, "m d_model"]) -> float:
    """Return the share of the smaller span that lies in the larger one."""
    bases = [torch.linalg.qr(rows.double().T).Q for rows in (one, other)]
    return float((bases[0].T @ bases[1]).square().sum() / min(len(one), len(other)))


def span_overlaps(methods: Sequence[Directions], pieces: Sequence[int]) -> list[dict[str, Any]]:
    """Return rows overlap.<method>.<other>.top_<n>[.random] of the first n directions of each, or all it has."""
    rows = []
    for one, other in itertools.combinations(methods, 2):
        for n in pieces:
            first, second = one.vectors[:n], other.vectors[:n]
            name, width = f"overlap.{one.method}.{other.method}.top_{n}", first.shape[1]
            rows.append(row(name, span_overlap(first, second), "fraction", width))
            rows.append(row(f"{name}.random", max(len(first), len(second)) / width, "fraction", width))
    return rows


def score_overlaps(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Return rows overlap.<method>.<other> of every two methods."""
    from scipy.stats import spearmanr

    return [
        row(
            f"overlap.{one}.{other}", float(spearmanr(scores[one], scores[other]).statistic), "rank correlation", len(a)
        )
        for (one, a), (other, _) in itertools.combinations(scores.items(), 2)
    ]
