"""Two hard sigmoids of the same number: one for masks, one for the terms that press importances down.

    lower_leaky(z) = clamp(z, 0, 1);  backward: g where 0 < z <= 1; alpha g where z <= 0 and g < 0; 0 elsewhere
    upper_leaky(z) = clamp(z, 0, 1), but 1 + alpha (z - 1) above 1;  backward as written, 1 at both ends of [0, 1]

A mask stays in [0, 1], and an importance of 0 can still rise, but is not pushed further down. Source: VPD (2026).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ALPHA = 0.01
"""Slope outside [0, 1]."""


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (z,), (gradient,) = ctx.saved_tensors, gradients
        below = ctx.alpha * gradient.clamp(max=0)
        return torch.where(z <= 0, below, gradient * (z <= 1)), None


class _UpperLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return torch.where(z > 1, 1 + alpha * (z - 1), z.clamp(0, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (z,), (gradient,) = ctx.saved_tensors, gradients
        return torch.where(z > 1, ctx.alpha * gradient, gradient * (z >= 0)), None


def lower_leaky(z: Float[Tensor, "*positions components"], alpha: float = ALPHA) -> Tensor:
    """Return the importance that masks are made of."""
    out: Tensor = _LowerLeaky.apply(z, alpha)
    return out


def upper_leaky(z: Float[Tensor, "*positions components"], alpha: float = ALPHA) -> Tensor:
    """Return the importance that importance minimality is made of."""
    out: Tensor = _UpperLeaky.apply(z, alpha)
    return out
