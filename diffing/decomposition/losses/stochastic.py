"""Stochastic reconstruction: random sources, at a random subset of the sites at each position."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffing.decomposition.losses.reconstruction import Task, masks_of, reconstruction
from diffing.decomposition.model import Decomposition, Importance


def routes(
    n_routed: Int[Tensor, "*positions"], noise: Float[Tensor, "sites *positions"]
) -> Bool[Tensor, "sites *positions"]:
    """Return the sites of each position that have the n_routed smallest numbers of `noise`."""
    return noise.argsort(dim=0).argsort(dim=0) < n_routed


def random_routes(
    n_sites: int, positions: torch.Size, generator: torch.Generator, device: torch.device
) -> Bool[Tensor, "sites *positions"]:
    """Draw k from 1 to n_sites at each position, and k of the sites."""
    n_routed = torch.randint(1, n_sites + 1, tuple(positions), generator=generator)
    return routes(n_routed, torch.rand((n_sites, *positions), generator=generator)).to(device)


def random_sources(lower: Float[Tensor, "*positions components"], generator: torch.Generator) -> Tensor:
    """Draw sources from U[0, 1], (positions, components + 1)."""
    shape = (*lower.shape[:-1], lower.shape[-1] + 1)
    return torch.rand(shape, generator=generator).to(lower.device)


def stochastic_reconstruction(
    decomposition: Decomposition,
    task: Task,
    batch: Any,
    target: Tensor,
    importances: Mapping[str, Importance],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Return the distance under one draw of masks, which stand for all of [g, 1]."""
    first = next(iter(importances.values())).lower
    routed = random_routes(len(importances), first.shape[:-1], generator, first.device)
    masks = {
        name: masks_of(importance.lower, random_sources(importance.lower, generator), of_site)
        for (name, importance), of_site in zip(importances.items(), routed, strict=True)
    }
    return reconstruction(decomposition, task, batch, target, masks)
