"""Triton kernels for the two sparse products on a GPU. Where Triton is missing, `dictionary.sparse` uses torch.

    bags    one program per bag and block of columns: no (entries, width) tensor, no atomic additions
    dots    one program per entry and part of the columns

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
    n_parts: int,
) -> Float[Tensor, "parts n"]:
    """out_pi = <left[left_ids_i], right[right_ids_i]> over the p-th of n_parts equal parts of the columns."""
    from crosscoders.kernels import triton_source

    n, width = len(left_ids), left.shape[1]
    out = torch.empty(n_parts, n, device=left.device)
    if n:
        triton_source.dots[(n, n_parts)](left_ids, right_ids, left, right, out, width, width // n_parts, n, BLOCK)
    return out
