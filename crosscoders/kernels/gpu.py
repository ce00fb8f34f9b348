"""Triton kernels for the two sparse products on a GPU. Where Triton is missing, `dictionary.sparse` uses torch.

    bags    one program per bag and block of columns: no (entries, width) tensor, no atomic additions
    dots    one program per entry

Both accumulate in float32 in the order of the entries, so a result does not change from run to run.
"""

import functools
import importlib.util

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256
"""Columns in one program."""


@functools.cache
def is_available() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def usable(*tensors: Tensor) -> bool:
    """Return whether the kernels can take these tensors: float32 on a GPU, contiguous."""
    return is_available() and all(t.is_cuda and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def bags(
    ids: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    starts: Int[Tensor, " bags"],
    rows: Float[Tensor, "rows width"],
) -> Float[Tensor, "bags width"]:
    """Return out_b = sum over the entries i of bag b of weights_i rows[ids_i]."""
    from crosscoders.kernels import triton_source

    width, n_bags = rows.shape[1], len(starts)
    out = torch.empty(n_bags, width, device=rows.device)
    edges = torch.cat([starts, starts.new_tensor([len(ids)])])
    triton_source.bags[n_bags, -(-width // BLOCK)](ids, weights, edges, rows, out, width, BLOCK)
    return out


def dots(
    left_ids: Int[Tensor, " n"],
    right_ids: Int[Tensor, " n"],
    left: Float[Tensor, "left width"],
    right: Float[Tensor, "right width"],
) -> Float[Tensor, " n"]:
    """Return out_i = <left[left_ids_i], right[right_ids_i]>."""
    from crosscoders.kernels import triton_source

    out = torch.empty(len(left_ids), device=left.device)
    if len(left_ids):
        triton_source.dots[len(left_ids),](left_ids, right_ids, left, right, out, left.shape[1], BLOCK)
    return out
