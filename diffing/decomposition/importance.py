"""How important each piece is at each position, before the sigmoid: one network per site, of two kinds.

`ScalarNetwork` gives each piece a network of one number, v_c . x; `SharedNetwork` reads the whole input of the site,
at mean square 1. Source: SPD (2506.20790), section 2.4, and VPD (2026).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

START = 0.5
"""Importance at the start, before what the input adds: every piece can rise and fall."""


class ScalarNetwork(nn.Module):
    """z_c = w2_c . gelu(w1_c h_c + b1_c) + b2_c, with h_c = v_c . x."""

    def __init__(self, n_components: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(n_components, hidden, generator=generator))
        self.b1 = nn.Parameter(torch.zeros(n_components, hidden))
        self.w2 = nn.Parameter(torch.randn(n_components, hidden, generator=generator) / hidden**0.5)
        self.b2 = nn.Parameter(torch.full((n_components,), START))

    def forward(
        self, x: Float[Tensor, "*positions d_in"], h: Float[Tensor, "*positions components"]
    ) -> Float[Tensor, "*positions components"]:
        return (functional.gelu(h[..., None] * self.w1 + self.b1) * self.w2).sum(dim=-1) + self.b2


class SharedNetwork(nn.Module):
    """z = W2 gelu(W1 x / rms(x) + b1) + b2."""

    def __init__(self, d_in: int, n_components: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(d_in, hidden, generator=generator) / d_in**0.5)
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.randn(hidden, n_components, generator=generator) / hidden**0.5)
        self.b2 = nn.Parameter(torch.full((n_components,), START))

    def forward(
        self, x: Float[Tensor, "*positions d_in"], h: Float[Tensor, "*positions components"]
    ) -> Float[Tensor, "*positions components"]:
        x = functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
        return functional.gelu(x @ self.w1 + self.b1) @ self.w2 + self.b2
