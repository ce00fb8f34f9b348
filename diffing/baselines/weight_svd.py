r"""The difference of the weights: rebuilt at a rank, or amplified. Both give a *model*, no direction.

    rank n     W_n = W_0 + sum_{i<=n} s_i u_i v_i^T,  the SVD of W_1 - W_0, for every matrix that differs
    strength a W_a = W_0 + a (W_1 - W_0)              a = 0 the base, 1 the tuned model

Other tensors (norms, biases) and, unless `with_embeddings`, the embeddings are those of the tuned model at every rank.
A tied head is its embedding. `rebuilt_` changes the weights of a model in place and puts them back at the end.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.models import hooks


class Factors(NamedTuple):
    """The difference of one matrix, taken apart; float32."""

    u: Float[Tensor, "n_out rank"]
    s: Float[Tensor, " rank"]
    """Largest first."""
    vt: Float[Tensor, "rank n_in"]

    def at_rank(self, n: int) -> Float[Tensor, "n_out n_in"]:
        """Return the sum of the first `n` pieces."""
        return (self.u[:, :n] * self.s[:n]) @ self.vt[:n]


class Delta(NamedTuple):
    """What the fine-tune changed, tensor by tensor."""

    base: dict[str, Tensor]
    tuned: dict[str, Tensor]
    matrices: dict[str, Factors]
    """Those in the layers that differ, by name; embeddings and heads are not among them."""


def weight_delta(base: Any, tuned: Any) -> Delta:
    """Take the differences of all matrices of the layers apart.

    Raises:
        InputError: the two models have other weights, or none that differ in the layers.
    """
    weights = [_weights(model) for model in (base, tuned)]
    odd = sorted(weights[0].keys() ^ weights[1].keys())
    odd += [name for name in weights[0] if name in weights[1] and weights[0][name].shape != weights[1][name].shape]
    if odd:
        raise InputError(f"base and tuned do not have the same weight {odd[0]!r}. Compare models of one architecture.")
    prefix = hooks.name_of_layers(hooks.core_model(base)) + "."
    matrices = {}
    for name, old in weights[0].items():
        difference = weights[1][name].float() - old.float()
        if old.ndim == 2 and name.startswith(prefix) and difference.any():
            matrices[name] = Factors(*torch.linalg.svd(difference, full_matrices=False))
    if not matrices:
        raise InputError("base and tuned differ in no matrix of their layers, so no rank can be cut.")
    return Delta(weights[0], weights[1], matrices)


def random_delta(delta: Delta, generator: torch.Generator) -> Delta:
    """Return a delta of random singular vectors with the same singular values, as a control."""
    drawn = {}
    for name, factors in delta.matrices.items():
        u, v = (
            torch.linalg.qr(torch.randn(len(side), len(factors.s), generator=generator).to(side)).Q
            for side in (factors.u, factors.vt.T)
        )
        drawn[name] = Factors(u, factors.s, v.T)
    return delta._replace(matrices=drawn)


@contextlib.contextmanager
def rebuilt_(model: Any, delta: Delta, rank: int) -> Iterator[Any]:
    """Give `model` the base's matrices with the first `rank` pieces of their difference, and the tuned rest.

    Raises:
        InputError: a rank below 0.
    """
    if rank < 0:
        raise InputError(f"rank is {rank}; give a number from 0.")
    wanted = {name: delta.base[name].float() + factors.at_rank(rank) for name, factors in delta.matrices.items()}
    with _weights_of(model, {**delta.tuned, **wanted}):
        yield model


@contextlib.contextmanager
def amplified_(model: Any, delta: Delta, strength: float) -> Iterator[Any]:
    """Give `model` the base's weights plus `strength` times the difference."""
    with _weights_of(
        model,
        {name: old.float() + strength * (delta.tuned[name].float() - old.float()) for name, old in delta.base.items()},
    ):
        yield model


def energy_shares(delta: Delta, ranks: list[int]) -> list[float]:
    """Return the mean over matrices of the share of ||W_1 - W_0||^2 that the first n pieces have, for each n."""
    shares = [factors.s.square() / factors.s.square().sum() for factors in delta.matrices.values()]
    return [sum(float(share[:n].sum()) for share in shares) / len(shares) for n in ranks]


def _weights(model: Any) -> dict[str, Tensor]:
    """Return copies of all weights; of those that are tied, one."""
    return {name: weight.detach().clone() for name, weight in hooks.core_model(model).named_parameters()}


@contextlib.contextmanager
def _weights_of(model: Any, wanted: dict[str, Tensor]) -> Iterator[None]:
    parameters = dict(hooks.core_model(model).named_parameters())
    before = {name: parameters[name].detach().clone() for name in wanted}
    try:
        with torch.no_grad():
            for name, weight in wanted.items():
                parameters[name].copy_(weight)
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                parameters[name].copy_(weight)
