"""Scored tokens with their activations."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from crosscoders.text.tokens import ROLES

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Tokens(NamedTuple):
    """Scored tokens with their activations, in cache order."""

    activations: Float[Tensor, "tokens n_models d_model"]
    """In the dtype of the cache."""
    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    """Position in the row, counted from 0 with the beginning-of-sequence token."""
    document_ids: Int[Tensor, " tokens"]
    roles: UInt8[Tensor, " tokens"]
    """Index into `tokens.ROLES`."""
    groups: Int[Tensor, " tokens"]
    """Index into the manifest's `groups`."""

    def slice(self, start: int, stop: int) -> "Tokens":
        return Tokens(*(t[start:stop] for t in self))


def fault_in(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], n_tokens: int) -> str | None:
    """Say what makes the tensors of a shard unfit for the manifest of its cache; None where they are fit."""
    names = set(Tokens._fields)
    if tensors.keys() != names:
        return f"holds the tensors {', '.join(sorted(tensors))}, not {', '.join(sorted(names))}"
    x, dtype = tensors["activations"], DTYPES[manifest["dtype"]]
    shape = (n_tokens, manifest["n_models"], manifest["d_model"])
    if tuple(x.shape) != shape or x.dtype != dtype:
        return f"has activations of shape {tuple(x.shape)} in {x.dtype}, not {shape} in {dtype}"
    for name, below in (("token_ids", None), ("positions", None), ("document_ids", None), ("roles", len(ROLES)),
                        ("groups", len(manifest["groups"]))):  # fmt: skip
        column = tensors[name]
        if tuple(column.shape) != (n_tokens,) or column.is_floating_point():
            return f"has {name} of shape {tuple(column.shape)} in {column.dtype}, not {n_tokens} whole numbers"
        if int(column.min()) < 0 or (below is not None and int(column.max()) >= below):
            return f"has {name} from {int(column.min())} to {int(column.max())}, of which there are {below or 'none'}"
    if not torch.stack(torch.aminmax(x)).isfinite().all():  # NaN is both; one pass without a copy
        return "has activations that are not finite"
    return None


def concatenate(parts: list[Tokens]) -> Tokens:
    """Return the parts end to end; one part alone is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Moments(NamedTuple):
    """Means over tokens, one entry per model."""

    mean: list[list[float]]
    """Mean of x, (n_models, d_model)."""
    norm: list[float]
    """Mean of ||x||."""
    square: list[float]
    """Mean of ||x||^2."""

    def spread(self) -> list[float]:
        """Return the mean of ||x - mean x||^2, per model."""
        return [square - sum(m * m for m in mean) for mean, square in zip(self.mean, self.square, strict=True)]


def moments_of(x: Float[Tensor, "tokens n_models d_model"]) -> Moments:
    """Return the means over given activations, in float64."""
    x = x.double()
    norms = x.norm(dim=-1)
    return Moments(x.mean(dim=0).tolist(), norms.mean(dim=0).tolist(), norms.square().mean(dim=0).tolist())
