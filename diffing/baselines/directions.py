r"""Directions of the residual stream that a method says the fine-tune moved, and their exchange between two models.

With Q an orthonormal basis of the first n directions, s the source model's activation and t the target's:

    patched = x_s + Q Q^T (x_t - x_s)         n directions carry over; all d_model of them give x_t

One number a token and direction is exchanged, whichever method the directions come from, so that methods are compared
at equal cost. `causal.patching` runs the models on these activations.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffing.causal.sets import PatchSet


class Directions(NamedTuple):
    """What one method gives."""

    method: str
    vectors: Float[Tensor, "n d_model"]
    """Unit length, the most important first."""
    scores: Float[Tensor, " n"]
    """By which the method orders them, in units of its own."""


class SpanExchange:
    """Builds activations of the target within a span of directions; sets are numbers of rows of `vectors`."""

    def __init__(self, vectors: Float[Tensor, "n d_model"]) -> None:
        self.vectors = vectors
        self._bases: dict[tuple[int, ...], Tensor] = {}

    def take_apart(
        self, x: Float[Tensor, "tokens n_models d_model"], is_template: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens n_models d_model"]:
        """Return the activations of both models in float32."""
        return x.float()

    def patched(
        self, parts: Float[Tensor, "tokens n_models d_model"], patch: PatchSet, target: int
    ) -> Float[Tensor, "tokens d_model"]:
        """Return the activation that goes into model `target` (0 base, 1 tuned) in place of its own."""
        source = parts[:, 1 - target]
        if patch.kind == "none":
            return source
        difference = parts[:, target] - source
        if patch.kind == "all":
            return source + difference
        assert patch.kind == "latents"
        basis = self._basis(patch.latents).to(parts.device)
        return source + (difference @ basis) @ basis.T

    def _basis(self, rows: tuple[int, ...]) -> Float[Tensor, "d_model rank"]:
        if rows not in self._bases:
            u, s, _ = torch.linalg.svd(self.vectors[list(rows)].double().T, full_matrices=False)
            self._bases[rows] = u[:, s > 1e-6 * s[0]].float()
        return self._bases[rows]
