"""Adversarial reconstruction: sources that an adversary chose, at every site and position."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffing.decomposition.losses.reconstruction import Task, masks_of, reconstruction
from diffing.decomposition.model import Decomposition, Importance


def adversarial_reconstruction(
    decomposition: Decomposition,
    task: Task,
    batch: Any,
    target: Tensor,
    importances: Mapping[str, Importance],
    sources: Mapping[str, Tensor],
) -> Float[Tensor, ""]:
    """Return the distance with these sources; they get the gradient that the adversary climbs."""
    masks = {name: masks_of(importance.lower, sources[name]) for name, importance in importances.items()}
    return reconstruction(decomposition, task, batch, target, masks)
