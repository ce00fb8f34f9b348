"""Models whose pieces are known: toy models of superposition, and planted changes of a small network.

    TMS 5-2         relu(W^T W x + b), five features in two dimensions, trained; with identity, a fixed 2 x 2 between
    planted         y = x + Wo relu(Wb x); the change of Wb is sum_k u_k v_k^T, v_k dual to feature k
    always-on       the same, the change of rank 3; it reads a part of every input, of one size and any direction

Features are sparse: each is U[0, 1] with a small probability, 0 otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from diffing.decomposition.loop import generator_of
from diffing.decomposition.losses.reconstruction import mean_square
from diffing.decomposition.sites import Delta, matrix


class VectorTask:
    """One vector in, one out, compared by the mean square."""

    distance = staticmethod(mean_square)

    def outputs(self, model: Any, batch: Tensor) -> Float[Tensor, "answers out"]:
        """Return what the model computes."""
        out: Tensor = model(batch)
        return out

    def counted(self, batch: Tensor) -> Bool[Tensor, "*positions"]:
        """Return that every vector counts."""
        return torch.ones(len(batch), dtype=torch.bool)


class Planted(NamedTuple):
    """A model with the change of its weights, and what is known of it."""

    model: nn.Module
    deltas: dict[str, Delta]
    features: Float[Tensor, "features d_in"]
    """Input direction of each feature."""
    pieces: Float[Tensor, "pieces d_out d_in"]
    """The rank-one changes that were planted in the only site."""
    probability: float
    """Of a feature in an input."""
    always: Float[Tensor, "always d_in"] | None = None
    """Orthonormal directions of which every input has a vector of norm 2, its direction uniform on the sphere."""

    def batch_of(self, seed: int, n: int) -> Callable[[int], Tensor]:
        """Return the inputs of each step."""

        def draw(step: int) -> Tensor:
            generator = generator_of(seed + 1000, step)
            x = sparse_features(n, len(self.features), self.probability, generator) @ self.features
            if self.always is None:
                return x
            parts = torch.randn(n, len(self.always), generator=generator)
            return x + 2 * functional.normalize(parts, dim=1) @ self.always

        return draw


def sparse_features(n: int, n_features: int, probability: float, generator: torch.Generator) -> Tensor:
    """Return (n, n_features), each U[0, 1] with this probability and 0 otherwise."""
    sizes = torch.rand(n, n_features, generator=generator)
    return sizes * (torch.rand(n, n_features, generator=generator) < probability)


class TMS(nn.Module):
    """relu(W^T (W x) + b), with linear maps between where asked for."""

    def __init__(self, n_features: int, d_hidden: int, *, has_identity: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = nn.Linear(n_features, d_hidden, bias=False)
        self.middle = nn.Linear(d_hidden, d_hidden, bias=False) if has_identity else None
        self.decoder = nn.Linear(d_hidden, n_features)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.randn(d_hidden, n_features, generator=generator) / n_features**0.5)
            self.decoder.bias.zero_()
            if self.middle is not None:
                self.middle.weight.copy_(torch.eye(d_hidden))
        self.tie_()

    @torch.no_grad()
    def tie_(self) -> None:
        """Make the decoder the transpose of the encoder."""
        self.decoder.weight.copy_(self.encoder.weight.T)

    def forward(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
        hidden = self.encoder(x)
        return functional.relu(self.decoder(hidden if self.middle is None else self.middle(hidden)))


def train_tms(
    model: TMS, present: Bool[Tensor, " features"], *, steps: int, seed: int, probability: float = 0.05
) -> None:
    """Train to give back the features that are present, with tied weights: AdamW, 1,024 inputs a step, rate 5e-3."""
    encoder, bias = model.encoder.weight.requires_grad_(), model.decoder.bias.requires_grad_()
    optimizer = torch.optim.AdamW([encoder, bias], lr=5e-3, weight_decay=0.01)
    for step in range(steps):
        x = sparse_features(1024, len(present), probability, generator_of(seed, step)) * present
        hidden = x @ encoder.T
        out = functional.relu(hidden @ encoder + bias)
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        functional.mse_loss(out, x).backward()
        optimizer.step()
    model.tie_()
    model.requires_grad_(False)


class Residual(nn.Module):
    """x + Wo relu(Wb x)"""

    def __init__(self, d: int, d_hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(d, d_hidden, bias=False), nn.Linear(d_hidden, d, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(d_hidden, d, generator=generator) / d**0.5)
            self.second.weight.copy_(torch.randn(d, d_hidden, generator=generator) / d_hidden**0.5)

    def forward(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        out: Tensor = x + self.second(functional.relu(self.first(x)))
        return out


def planted_linear(seed: int, *, n_features: int = 12, n_planted: int = 6, d: int = 16) -> Planted:
    """Return T1: y = x + dW x + Wo relu(Wb x), where dW has one piece for each of the first features."""
    generator = torch.Generator().manual_seed(seed)
    features = functional.normalize(torch.randn(n_features, d, generator=generator), dim=1)
    triggers = torch.linalg.pinv(features).T[:n_planted]
    effects = 2.5 * functional.normalize(torch.randn(n_planted, d, generator=generator), dim=1)
    pieces = effects[:, :, None] * triggers[:, None, :]
    return _with_change(Residual(d, 32, generator), pieces, features, 0.1)


def always_on(seed: int, *, n_features: int = 12, d: int = 16) -> Planted:
    """Return T4 (ii): the change is of rank 3, and reads a part that every input has and no feature touches.

    Its direction is uniform, so no basis of the space is off more often than another, as ±1 in each part would allow.
    """
    generator = torch.Generator().manual_seed(seed)
    reads = torch.linalg.qr(torch.randn(d, 3, generator=generator)).Q.T
    drawn = torch.randn(n_features, d, generator=generator)
    features = functional.normalize(drawn - drawn @ reads.T @ reads, dim=1)
    writes = 2.5 * torch.linalg.qr(torch.randn(d, 3, generator=generator)).Q.T
    made = _with_change(Residual(d, 32, generator), writes[:, :, None] * reads[:, None, :], features, 0.1)
    return made._replace(always=reads)


def no_effect(seed: int) -> Planted:
    """Return T4 (i): a change that reads only what no input holds."""
    planted = planted_linear(seed, n_planted=0)
    left = torch.linalg.svd(planted.features).Vh[len(planted.features) :]
    change = torch.randn(16, len(left), generator=torch.Generator().manual_seed(seed)) @ left
    return _with_change(planted.model, change[None], planted.features, 0.1)


class _Changed(nn.Module):
    """A model with one linear map beside it, whose weight is the change: y = model(x) + change x."""

    def __init__(self, model: nn.Module, change: Float[Tensor, "d d"]) -> None:
        super().__init__()
        self.before, self.change = model, nn.Linear(change.shape[1], change.shape[0], bias=False)
        with torch.no_grad():
            self.change.weight.copy_(change)

    def forward(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        out: Tensor = self.before(x) + self.change(x)
        return out


def _with_change(model: nn.Module, pieces: Tensor, features: Tensor, probability: float) -> Planted:
    changed = _Changed(model.before if isinstance(model, _Changed) else model, pieces.sum(dim=0))
    return Planted(changed, {"change": Delta(matrix(changed.change))}, features, pieces, probability)
