"""How much of a fine-tune sets of pieces give, and how much is lost without them, by the size of the set.

    sufficiency(S)  1 - KL(tuned || base with the pieces of S) / KL(tuned || base)
    necessity(S)    KL(tuned || tuned without the pieces of S) / KL(tuned || base)
    robust(S)       1 - KL(tuned || pieces of S on, all else as a fresh adversary likes it) / KL(tuned || base)

"Base" is the model with every mask 0. Pieces of all sites are ranked together, by `written`: what a piece writes,
||u_c|| rms(v_c . x) over the tokens, times its mean importance where it has one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffing.decomposition.adversary import attack
from diffing.decomposition.evaluation import distance_of
from diffing.decomposition.losses.reconstruction import Task, reconstruction
from diffing.decomposition.model import Decomposition
from diffing.decomposition.sites import Masks


class Point(NamedTuple):
    """One size of set, shares of the KL to explain."""

    n_pieces: int
    sufficiency: float
    necessity: float


Chosen = Mapping[str, Sequence[int]]
"""Pieces of each site."""


def masks_with(
    decomposition: Decomposition, chosen: Chosen, *, on: bool, remainder: bool | None = None
) -> dict[str, Masks]:
    """Return constant masks in which the chosen pieces are `on` and all others are not; the remainder as the others,
    unless it is given."""
    masks = decomposition.constant(float(not on), float(not on if remainder is None else remainder))
    for name, numbers in chosen.items():
        masks[name].components[list(numbers)] = float(on)
    return masks


@torch.no_grad()
def written(
    decomposition: Decomposition, task: Task, batches: Sequence[Any], weights: Mapping[str, Tensor] | None = None
) -> dict[str, Float[Tensor, " components"]]:
    """Return what each piece writes, times `weights` such as mean importances where they are given."""
    squares, n = {name: torch.zeros_like(site.U[:, 0]) for name, site in decomposition.sites.items()}, 0
    for batch in batches:
        with decomposition.reading() as inputs:
            task.outputs(decomposition.model, batch)
        counted = task.counted(batch)
        n += int(counted.sum())
        for name, site in decomposition.sites.items():
            squares[name] += site.activations(inputs[name])[counted].square().sum(dim=0)
    return {
        name: (squares[name] / n).sqrt() * site.pieces()[1].norm(dim=1) * (1 if weights is None else weights[name])
        for name, site in decomposition.sites.items()
    }


def ranked(amounts: Mapping[str, Float[Tensor, " _"]]) -> list[tuple[str, int]]:
    """Return (site, number) of all pieces, those that write most first."""
    pairs = [(float(a), name, i) for name, of_site in amounts.items() for i, a in enumerate(of_site)]
    return [(name, i) for _, name, i in sorted(pairs, key=lambda pair: -pair[0])]


def by_site(pieces: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """Return the numbers of each site."""
    chosen: dict[str, list[int]] = {}
    for name, number in pieces:
        chosen.setdefault(name, []).append(number)
    return chosen


def curve(
    decomposition: Decomposition,
    task: Task,
    batches: Sequence[Any],
    order: Sequence[tuple[str, int]],
    sizes: Sequence[int],
    reference: float,
) -> list[Point]:
    """Return a point for each size, of the first pieces of an order."""
    points = []
    for size in sizes:
        chosen = by_site(order[:size])
        alone, without = (masks_with(decomposition, chosen, on=on) for on in (True, False))
        kls = [distance_of(decomposition, task, batches, masks) / reference for masks in (alone, without)]
        points.append(Point(size, 1 - kls[0], kls[1]))
    return points


def whole_sites(
    decomposition: Decomposition, task: Task, batches: Sequence[Any], names: Sequence[str], reference: float
) -> float:
    """Return the sufficiency of the whole change of some sites."""
    masks = decomposition.constant(0, 0) | {
        name: of for name, of in decomposition.constant(1, 1).items() if name in names
    }
    return 1 - distance_of(decomposition, task, batches, masks) / reference


def robust(
    decomposition: Decomposition, task: Task, batch: Any, chosen: Chosen, reference: float, *, steps: int, seed: int = 0
) -> list[float]:
    """Return the share that a set protects before each step of a fresh adversary on everything else, and after the
    last."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        target = task.outputs(decomposition.model, batch)
    start = {
        name: torch.rand(site.n_components + 1, generator=generator).to(target.device)
        for name, site in decomposition.sites.items()
    }
    protected = {name: of.components for name, of in masks_with(decomposition, chosen, on=True).items()}

    def loss_of(sources: Mapping[str, Tensor]) -> Tensor:
        masks = {name: Masks(protected[name] + (1 - protected[name]) * s[:-1], s[-1]) for name, s in sources.items()}
        return reconstruction(decomposition, task, batch, target, masks)

    _, losses = attack(loss_of, start, steps=steps)
    return [1 - loss / reference for loss in losses]
