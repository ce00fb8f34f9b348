r"""A site: one linear map of a model, its change D as rank-one pieces and an exact remainder, and which maps are sites.

    D = sum_c u_c v_c^T + R,   R = D - sum_c u_c v_c^T, computed from the pieces as they are

With masks m_c and m_R per position the map's output y = W1 x + b becomes that of W0 + sum_c m_c u_c v_c^T + m_R R:

    y + (m_R - 1) D x + sum_c (m_c - m_R) u_c (v_c . x)

so neither R nor a masked weight is ever made, biases are as they are, and masks of 1 change nothing. W0 = 0 and D = W1
is the decomposition of one model, W0 = base and D = W1 - W0 that of a fine-tune. Parameters are kept at unit size:
D = scale * D'. A change of low rank is held as write D' read, with orthonormal bases, and the pieces live between them.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosscoders.common.errors import InputError


class Masks(NamedTuple):
    """Say what of a site is on, at each position or everywhere."""

    components: Float[Tensor, "*positions components"]
    remainder: Float[Tensor, "*positions"]
    routed: Bool[Tensor, "*positions"] | None = None
    """Positions that the masks hold at; the others have the map as it is. None: all."""


class Delta(NamedTuple):
    """What is decomposed at a site: write @ inner @ read, or inner alone."""

    inner: Float[Tensor, "out in"]
    read: Float[Tensor, "in d_in"] | None = None
    """Orthonormal rows."""
    write: Float[Tensor, "d_out out"] | None = None
    """Orthonormal columns."""

    def whole(self) -> Float[Tensor, "d_out d_in"]:
        """Return the change as one matrix."""
        left = self.inner if self.write is None else self.write @ self.inner
        return left if self.read is None else left @ self.read


class Site(nn.Module):
    """The pieces of one linear map, V (d_in, components) and U (components, d_out) at unit size."""

    delta: Tensor
    read: Tensor | None
    write: Tensor | None

    def __init__(self, delta: Delta, n_components: int, generator: torch.Generator, *, scale: float = 1.0) -> None:
        super().__init__()
        d_out, d_in = delta.inner.shape
        self.scale = scale
        self.register_buffer("delta", delta.inner.float() / scale, persistent=False)
        for name, basis in (("read", delta.read), ("write", delta.write)):
            self.register_buffer(name, None if basis is None else basis.float(), persistent=False)
        self.V = nn.Parameter(torch.randn(d_in, n_components, generator=generator) / math.sqrt(d_in))
        self.U = nn.Parameter(torch.randn(n_components, d_out, generator=generator) / math.sqrt(n_components))

    @property
    def n_components(self) -> int:
        """Return the number of pieces."""
        return self.V.shape[1]

    def inner(self, x: Float[Tensor, "*positions d_in"]) -> Float[Tensor, "*positions inner"]:
        """Return what the pieces read of an input."""
        return x.to(self.V.dtype) if self.read is None else x.to(self.V.dtype) @ self.read.T

    def activations(self, x: Float[Tensor, "*positions d_in"]) -> Float[Tensor, "*positions components"]:
        """Return v_c . x of each piece."""
        return self.inner(x) @ self.V

    def remainder(self) -> Float[Tensor, "out in"]:
        """Return R at unit size, with its gradient to V and U."""
        return self.delta - (self.V @ self.U).T

    def masked(
        self, x: Float[Tensor, "*positions d_in"], out: Float[Tensor, "*positions d_out"], masks: Masks
    ) -> Float[Tensor, "*positions d_out"]:
        """Return the output of the map with these masks, from its input and its output."""
        inner, m_remainder = self.inner(x), masks.remainder[..., None]
        change = (m_remainder - 1) * (inner @ self.delta.T)
        change = change + ((masks.components - m_remainder) * (inner @ self.V)) @ self.U
        if self.write is not None:
            change = change @ self.write.T
        if masks.routed is not None:
            change = change * masks.routed[..., None]
        return out + (self.scale * change).to(out.dtype)

    def pieces(self) -> tuple[Float[Tensor, "d_in components"], Float[Tensor, "components d_out"]]:
        """Return V and U in the units and the spaces of the map: their product is what they explain of D."""
        V, U = self.V.detach(), self.U.detach() * self.scale
        return V if self.read is None else self.read.T @ V, U if self.write is None else U @ self.write.T

    @torch.no_grad()
    def set_pieces(self, V: Float[Tensor, "d_in components"], U: Float[Tensor, "components d_out"]) -> None:
        """Take pieces in the units and the spaces of the map."""
        self.V.copy_(V if self.read is None else self.read @ V)
        self.U.copy_((U if self.write is None else U @ self.write) / self.scale)


def matrix(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """Return the weight of a linear map, rows out; GPT-2's Conv1D holds it the other way round."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight if isinstance(module, nn.Linear) else weight.T).detach().float()


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the maps of a model that can be sites, by name: linear ones, GPT-2's, and those with a LoRA around them;
    no embedding and not what gives the logits, which language models often tie to it."""
    from transformers.pytorch_utils import Conv1D

    head_of: Any = getattr(model, "get_output_embeddings", None)
    head = head_of() if head_of else None
    maps: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{parent}.") for parent in maps)
        is_adapted = (
            hasattr(module, "base_layer") and hasattr(module, "lora_A") and not hasattr(module, "num_embeddings")
        )
        if module is not head and not inside and (isinstance(module, nn.Linear | Conv1D) or is_adapted):
            maps[name] = module
    return maps


def find_sites(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the linear maps that match one of the patterns (`*` and `?` as in file names), in the model's
    order.

    Raises:
        InputError: a pattern matches none.
    """
    names = list(linear_maps(model))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = names[0] if names else "none"
            raise InputError(
                f"sites: {pattern!r} matches none of the {len(names)} linear maps of {type(model).__name__} (the first "
                f"is {example}). Use a pattern such as '*q_proj'."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
