"""What a decomposition explains: distances under importances as masks, pieces that are alive, the adversary's plateau.

Every distance is over that of the model with all masks 0, so it is the share of the change that is not explained.
Masks made of importances are only looked at, never trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffing.decomposition.adversary import ATTACK_STEP, ATTACK_STEPS, attack
from diffing.decomposition.loop import ON, generator_of
from diffing.decomposition.losses.adversarial import adversarial_reconstruction
from diffing.decomposition.losses.reconstruction import Task, reconstruction
from diffing.decomposition.losses.stochastic import stochastic_reconstruction
from diffing.decomposition.model import Decomposition, Importance
from diffing.decomposition.sites import Masks


class Explained(NamedTuple):
    """Hold what one decomposition explains of some batches."""

    reference: float
    """Distance of the model with every mask 0, in its unit."""
    unexplained: dict[str, float]
    """Share of it that is left under masks: pieces (all on, no remainder), importances, rounded (on from ON, no
    remainder), stochastic."""
    l0: float
    """Pieces above ON at a position, added over sites."""
    highest: dict[str, Float[Tensor, " components"]]
    """Largest importance of each piece."""
    mean: dict[str, Float[Tensor, " components"]]
    """Its mean over positions."""
    n_positions: int

    def alive(self) -> dict[str, list[int]]:
        """Return the pieces of each site whose importance was above ON somewhere."""
        return {name: (of_site > ON).nonzero().flatten().tolist() for name, of_site in self.highest.items()}


def reference_of(decomposition: Decomposition, task: Task, batches: Sequence[Any]) -> float:
    """Return the mean distance of the model with every mask 0 to the model as it is."""
    off = decomposition.constant(0, 0)
    return distance_of(decomposition, task, batches, off)


@torch.no_grad()
def distance_of(decomposition: Decomposition, task: Task, batches: Sequence[Any], masks: Mapping[str, Masks]) -> float:
    """Return the mean distance of the model with masks that are the same everywhere, over all answers."""
    total, n = 0.0, 0
    for batch in batches:
        target = task.outputs(decomposition.model, batch)
        total += len(target) * float(reconstruction(decomposition, task, batch, target, masks))
        n += len(target)
    return total / n


@torch.no_grad()
def looked_at(
    decomposition: Decomposition, task: Task, batch: Any
) -> tuple[Float[Tensor, "answers out"], dict[str, Importance]]:
    """Return the outputs of the model as it is, and the importances."""
    with decomposition.reading() as inputs:
        target = task.outputs(decomposition.model, batch)
    return target, decomposition.importances(inputs)


@torch.no_grad()
def explained(decomposition: Decomposition, task: Task, batches: Sequence[Any], *, seed: int = 0) -> Explained:
    """Return the shares, counts and importances over the batches."""
    reference = reference_of(decomposition, task, batches)
    names, none = decomposition.names, torch.tensor(0.0)
    sums = dict.fromkeys(("pieces", "importances", "rounded", "stochastic"), 0.0)
    mean: dict[str, Tensor] = {}
    highest: dict[str, Tensor] = {}
    n_on, n, n_answers = 0.0, 0, 0
    for number, batch in enumerate(batches):
        target, importances = looked_at(decomposition, task, batch)
        lower, counted = {name: of.lower for name, of in importances.items()}, task.counted(batch)
        masks = {
            "pieces": decomposition.constant(1, 0),
            "importances": {name: Masks(lower[name], none.to(target.device)) for name in names},
            "rounded": {name: Masks((lower[name] > ON).float(), none.to(target.device)) for name in names},
        }
        for kind, of_kind in masks.items():
            sums[kind] += len(target) * float(reconstruction(decomposition, task, batch, target, of_kind))
        drawn = stochastic_reconstruction(decomposition, task, batch, target, importances, generator_of(seed, number))
        sums["stochastic"] += len(target) * float(drawn)
        n_answers += len(target)
        for name, of_site in lower.items():
            of_site = of_site[counted]
            top = of_site.amax(dim=0)
            highest[name] = torch.maximum(highest[name], top) if name in highest else top
            mean[name] = mean.get(name, 0) + of_site.sum(dim=0)
            n_on += float((of_site > ON).sum())
        n += int(counted.sum())
    shares = {kind: total / n_answers / max(reference, 1e-30) for kind, total in sums.items()}
    return Explained(reference, shares, n_on / n, highest, {name: total / n for name, total in mean.items()}, n)


def attacked(
    decomposition: Decomposition,
    task: Task,
    batch: Any,
    reference: float,
    *,
    steps: int = ATTACK_STEPS,
    step_size: float = ATTACK_STEP,
    seed: int = 0,
) -> list[float]:
    """Return the share that is left under a fresh adversary before each of its steps and after the last: one source for
    each piece, shared by all positions, from a random start."""
    target, importances = looked_at(decomposition, task, batch)
    shape = [1] * task.counted(batch).ndim
    generator = torch.Generator().manual_seed(seed)
    start = {
        name: torch.rand((*shape, site.n_components + 1), generator=generator).to(target.device)
        for name, site in decomposition.sites.items()
    }
    _, losses = attack(
        lambda sources: adversarial_reconstruction(decomposition, task, batch, target, importances, sources),
        start, steps=steps, step_size=step_size,
    )  # fmt: skip
    return [loss / max(reference, 1e-30) for loss in losses]
