"""Triton kernels for the two sparse products on a GPU. Where Triton is missing, `crosscoders.sparse` uses torch.

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
    return importlib.util.find_spec("triton") is not None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: float32 on a GPU, contiguous."""
    return is_available() and all(t.is_cuda and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def bags(
    ids: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    starts: Int[Tensor, " bags"],
    rows: Float[Tensor, "rows width"],
    bias: Float[Tensor, " width"] | None = None,
) -> Float[Tensor, "bags width"]:
    """out_b = bias + sum over the entries i of bag b of weights_i rows[ids_i]."""
    from crosscoders.kernels import triton_source

    width, n_bags = rows.shape[1], len(starts)
    out = torch.empty(n_bags, width, device=rows.device)
    edges = torch.cat([starts, starts.new_tensor([len(ids)])])
    grid = (n_bags, -(-width // BLOCK))
    triton_source.bags[grid](
        ids, weights, edges, rows, rows if bias is None else bias, out, width, bias is not None, BLOCK
    )
    return out


def dots(
    left_ids: Int[Tensor, " n"],
    right_ids: Int[Tensor, " n"],
    left: Float[Tensor, "left width"],
    right: Float[Tensor, "right width"],
) -> Float[Tensor, " n"]:
    """out_i = <left[left_ids_i], right[right_ids_i]>."""
    from crosscoders.kernels import triton_source

    out = torch.empty(len(left_ids), device=left.device)
    if len(left_ids):
        triton_source.dots[(len(left_ids),)](left_ids, right_ids, left, right, out, left.shape[1], BLOCK)
    return out
