"""Necessity and sufficiency of the first n directions for a behaviour, beside random sets that write as much.

    necessity     share of the target's decisions that are left when the first n are ablated
    sufficiency   share that are given when only the first n are on

Directions are ranked once, at the whole adapter, by the selective score of `sets`. Differences to the random sets are
paired over prompts, with their standard error.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from diffing.topk_lora.prompts import DECISION_TOKENS, Prompts, given
from diffing.topk_lora.sets import Directions, matched, selective_scores

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Point(NamedTuple):
    """One size of one curve."""

    curve: str
    """necessity or sufficiency"""
    n_directions: int
    share: float
    random: float
    """Mean over the random sets."""
    difference: float
    """share - random, mean over prompts."""
    stderr: float
    """Of the difference, over prompts."""
    n_prompts: int


def ranked(model: Any, directions: Directions, prompts: Prompts, target: str) -> Int[np.ndarray, " directions"]:
    """Return all directions, those first that matter for the target and for no other label."""
    scores = selective_scores(model, directions, torch.ones(directions.n, device=directions.device), prompts, target)
    return np.argsort(-scores, kind="stable")


def curves(
    model: Any, directions: Directions, search: Prompts, held_out: Prompts, target: str, *,
    sizes: tuple[int, ...] = SIZES, n_draws: int = 4, seed: int = 0,
) -> list[Point]:  # fmt: skip
    """Return both curves on the held-out prompts of the target; the order is that of the prompts of the search."""
    order = ranked(model, directions, search, target)
    of_target = held_out.take(held_out.of(target))
    mass = directions.mass(model, search.take(search.of(target)))
    generator = np.random.default_rng(seed)
    points = []
    for n in (size for size in sizes if size <= directions.n // 2):
        random = [matched(order[:n], mass, generator) for _ in range(n_draws)]
        for curve in ("necessity", "sufficiency"):
            own, *others = (_decisions(model, directions, chosen, of_target, curve) for chosen in (order[:n], *random))
            differences = own - np.mean(others, axis=0)
            stderr = float(differences.std(ddof=1) / len(own) ** 0.5) if len(own) > 1 else float("nan")
            means = float(own.mean()), float(np.mean(others)), float(differences.mean())
            points.append(Point(curve, n, *means, stderr, len(own)))
    return points


def _decisions(
    model: Any, directions: Directions, chosen: Int[np.ndarray, " chosen"], prompts: Prompts, curve: str
) -> Float[np.ndarray, " prompts"]:
    """Return for each prompt whether its decision is given."""
    m = directions.without(chosen)
    with directions.multiplied(m if curve == "necessity" else 1 - m):
        return given(model, prompts)[:, DECISION_TOKENS - 1].astype(float)
