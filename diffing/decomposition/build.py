"""From matrices to a fresh decomposition, and from the matrices' names to what is decomposed."""

from collections.abc import Mapping

import torch
from torch import nn

from diffing.decomposition.importance import ScalarNetwork, SharedNetwork
from diffing.decomposition.model import Decomposition
from diffing.decomposition.settings import DecompositionConfig
from diffing.decomposition.sites import Delta, Site, matrix


def whole_weights(model: nn.Module, names: list[str]) -> dict[str, Delta]:
    """Return the weights themselves, for the decomposition of one model."""
    return {name: Delta(matrix(model.get_submodule(name))) for name in names}


def fresh(
    model: nn.Module, deltas: Mapping[str, Delta], config: DecompositionConfig, *, is_relative: bool = False
) -> Decomposition:
    """Return a decomposition at its start.

    is_relative: each change is held in units of its own size, ||D|| / sqrt(rows), so that one learning rate fits all.
    """
    generator = torch.Generator().manual_seed(config.seed)
    sites, networks = {}, {}
    for name, delta in deltas.items():
        size = float(delta.inner.norm()) / len(delta.inner) ** 0.5
        site = Site(delta, config.components, generator, scale=size if is_relative and size > 0 else 1.0)
        d_in = site.V.shape[0] if site.read is None else site.read.shape[1]
        sites[name] = site
        networks[name] = (
            ScalarNetwork(config.components, config.hidden, generator)
            if config.network == "scalar"
            else SharedNetwork(d_in, config.components, config.hidden, generator)
        )
    return Decomposition(model, sites, networks)
