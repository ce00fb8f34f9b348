"""A model with some of its linear maps decomposed: run it with masks, read what the sites read, tell importances.

`Decomposition.reading` collects the inputs of the sites while the model runs as it is, `importances` turns them into an
importance for each piece and position, `masked` puts masks on while the model runs. The model's weights are never
changed, and are no part of the module's state.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffing.decomposition.sigmoids import lower_leaky, upper_leaky
from diffing.decomposition.sites import Masks, Site


class Importance(NamedTuple):
    """Hold the importances of the pieces of one site, at each position."""

    lower: Float[Tensor, "*positions components"]
    """In [0, 1]; what masks are made of, and what is reported."""
    upper: Float[Tensor, "*positions components"]
    """A little above 1 where the network says more; what importance minimality is made of."""


class Decomposition(nn.Module):
    """Sites of a model with their importance networks."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(sites)
        self.model_of: tuple[Any] = (
            model.requires_grad_(False),
        )  # in a tuple, so that its weights are no part of this
        self.all_sites = nn.ModuleList(sites.values())
        self.networks = nn.ModuleList([networks[name] for name in self.names])

    @property
    def model(self) -> Any:
        """Return the model, with every piece on."""
        return self.model_of[0]

    @property
    def sites(self) -> dict[str, Site]:
        """Return the sites by name."""
        return dict(zip(self.names, self.all_sites, strict=True))  # type: ignore[arg-type]

    def pieces_and_networks(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return what is trained, V and U apart from the importance networks."""
        return list(self.all_sites.parameters()), list(self.networks.parameters())

    @contextlib.contextmanager
    def reading(self, *, with_graph: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collect the inputs of the sites while the model runs; with_graph: to be differentiated through."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _module, args: inputs.__setitem__(name, args[0] if with_graph else args[0].detach())

        handles = [self.model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in self.names]
        try:
            yield inputs
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def masked(self, masks: Mapping[str, Masks]) -> Iterator[None]:
        """Let the model run with these masks; sites that are not named are as they are."""

        def edit(site: Site, of: Masks) -> Any:
            return lambda _module, args, out: site.masked(args[0], out, of)

        handles = [
            self.model.get_submodule(name).register_forward_hook(edit(site, masks[name]))
            for name, site in self.sites.items()
            if name in masks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def importances(self, inputs: Mapping[str, Tensor]) -> dict[str, Importance]:
        """Return the importance of every piece, from the inputs of its site in the model as it is."""
        importances = {}
        for (name, site), network in zip(self.sites.items(), self.networks, strict=True):
            z = network(inputs[name], site.activations(inputs[name]))
            importances[name] = Importance(lower_leaky(z), upper_leaky(z))
        return importances

    def constant(self, components: float, remainder: float) -> dict[str, Masks]:
        """Return the same mask for every piece of every site, at all positions."""
        return {
            name: Masks(torch.full_like(site.U[:, 0].detach(), components), site.U.new_tensor(remainder))
            for name, site in self.sites.items()
        }
