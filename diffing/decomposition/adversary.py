"""The adversary: sources in [0, 1] that make the reconstruction as bad as the importances let it.

`Adversary` persists through training, one source per batch row, position and piece, moved by Adam (ascent, clamped);
`attack` is a fresh one for evaluation, one source per piece for all positions, moved by the sign of its gradient.
Source: VPD (2026), with its constants.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

BETA1, BETA2, EPS = 0.5, 0.99, 1e-8
ATTACK_STEPS, ATTACK_STEP = 20, 0.1


class Adversary:
    """Sources with the moments of Adam; `state` is all that decides what follows."""

    def __init__(self, sources: Mapping[str, Float[Tensor, "*rows_positions _"]]) -> None:
        self.sources = {name: source.clone() for name, source in sources.items()}
        self.m, self.v = ({n: torch.zeros_like(s) for n, s in self.sources.items()} for _ in range(2))
        self.t = 0

    def on(self, shape: torch.Size) -> dict[str, Tensor]:
        """Return the sources of the first rows and positions, as leaves; shape: of the positions of a batch."""
        part = tuple(slice(n) for n in shape)
        return {name: source[part].detach().clone().requires_grad_() for name, source in self.sources.items()}

    @torch.no_grad()
    def ascend(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Move the sources that have a gradient, those of the first rows and positions, and clamp them to [0, 1]."""
        self.t += 1
        for name, gradient in gradients.items():
            part = tuple(slice(n) for n in gradient.shape)
            source, m, v = self.sources[name][part], self.m[name][part], self.v[name][part]
            m.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
            v.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            step = (m / (1 - BETA1**self.t)) / ((v / (1 - BETA2**self.t)).sqrt() + EPS)
            source.add_(step, alpha=lr).clamp_(0, 1)

    def state(self) -> dict[str, Tensor]:
        """Return everything, as tensors that share its memory."""
        parts = {"source": self.sources, "m": self.m, "v": self.v}
        tensors = {f"{kind}.{name}": tensor for kind, part in parts.items() for name, tensor in part.items()}
        return tensors | {"t": torch.tensor(self.t)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        for key, tensor in self.state().items():
            tensor.copy_(state[key])
        self.t = int(state["t"])


def gradients_of(loss: Tensor, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of the loss with respect to the sources."""
    return dict(zip(sources, torch.autograd.grad(loss, list(sources.values())), strict=True))


def attack(
    loss_of: Callable[[Mapping[str, Tensor]], Float[Tensor, ""]],
    sources: Mapping[str, Tensor],
    *,
    steps: int = ATTACK_STEPS,
    step_size: float = ATTACK_STEP,
) -> tuple[dict[str, Tensor], list[float]]:
    """Return sources after `steps` ascents from `sources`, and the loss before each and after the last."""
    moved, losses = {name: source.detach().clone() for name, source in sources.items()}, []
    for _ in range(steps):
        leaves = {name: source.requires_grad_() for name, source in moved.items()}
        loss = loss_of(leaves)
        losses.append(float(loss.detach()))
        found = gradients_of(loss, leaves)
        moved = {name: (s.detach() + step_size * found[name].sign()).clamp(0, 1) for name, s in leaves.items()}
    with torch.no_grad():
        losses.append(float(loss_of(moved)))
    return moved, losses
