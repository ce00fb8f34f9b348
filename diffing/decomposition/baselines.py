"""Other rank-one pieces of the same changes, at equal count: what a decomposition has to beat.

    svd            singular pieces of D
    weighted-svd   singular pieces of D Sigma^(1/2), read through Sigma^(-1/2); Sigma = mean of x x^T at the site
    lora           s B_j A_j of the adapter, as it was trained
    rotation       the singular pieces in a random orthogonal basis
    trained        the pieces of a decomposition

Each is a `Pieces`; `with_pieces` puts one into a decomposition, whose masks then choose among them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffing.decomposition.importance import ScalarNetwork
from diffing.decomposition.model import Decomposition
from diffing.decomposition.sites import Delta, Site

Pieces = dict[str, tuple[Tensor, Tensor]]
"""V (d_in, pieces) and U (pieces, d_out) of each site."""


def svd(deltas: Mapping[str, Delta]) -> Pieces:
    """Return the singular pieces of each change, those above 1e-6 of the largest."""
    pieces = {}
    for name, delta in deltas.items():
        v, written = _singular(delta.whole().double())
        pieces[name] = (v.float(), written.float())
    return pieces


def _singular(matrix: Float[Tensor, "d_out d_in"]) -> tuple[Tensor, Tensor]:
    """Return V and S U^T of a matrix, of the singular values above 1e-6 of the largest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    n = int((s > 1e-6 * s[0]).sum())
    return vh[:n].T, (u[:, :n] * s[:n]).T


def weighted_svd(deltas: Mapping[str, Delta], moments: Mapping[str, Float[Tensor, "_ _"]]) -> Pieces:
    """Return pieces whose first n leave the least of D x in the mean square; moments: mean x x^T of each site."""
    pieces = {}
    for name, delta in deltas.items():
        values, vectors = torch.linalg.eigh(moments[name].double())
        root = values.clamp_min(1e-8 * float(values[-1])).sqrt()
        v, written = _singular(delta.whole().double() @ (vectors * root))
        pieces[name] = ((vectors / root @ v).float(), written.float())
    return pieces


def rotation(deltas: Mapping[str, Delta], seed: int) -> Pieces:
    """Return the singular pieces, U S^(1/2) Q and Q^T S^(1/2) V^T, with a random Q."""
    generator = torch.Generator().manual_seed(seed)
    pieces = {}
    for name, (V, U) in svd(deltas).items():
        root = U.norm(dim=1).sqrt()
        q = torch.linalg.qr(torch.randn(len(U), len(U), generator=generator)).Q
        pieces[name] = ((V * root) @ q, q.T @ (U / root[:, None]))
    return pieces


def lora(model: nn.Module, names: list[str]) -> Pieces:
    """Return the rank directions of a LoRA as they were trained, of the sites that have one."""
    pieces = {}
    for name in names:
        module: Any = model.get_submodule(name)
        if hasattr(module, "lora_A"):
            (adapter,) = module.active_adapters
            a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
            pieces[name] = (a.T.float(), b.T.float() * module.scaling[adapter])
    return pieces


def trained(decomposition: Decomposition) -> Pieces:
    """Return the pieces of a decomposition."""
    return {name: site.pieces() for name, site in decomposition.sites.items()}


def with_pieces(model: nn.Module, deltas: Mapping[str, Delta], pieces: Pieces) -> Decomposition:
    """Return a decomposition of these pieces; its networks are not trained, and only constant masks mean something."""
    generator = torch.Generator().manual_seed(0)
    sites, networks = {}, {}
    for name, (V, U) in pieces.items():
        sites[name] = Site(Delta(deltas[name].whole()), V.shape[1], generator)
        sites[name].set_pieces(V, U)
        networks[name] = ScalarNetwork(V.shape[1], 1, generator)
    return Decomposition(model, sites, networks)
