"""The Triton programs of `crosscoders.kernels.gpu`; imported only where Triton is installed."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def bags(ids, weights, edges, rows, out, width, block: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    total = tl.zeros([block], dtype=tl.float32)
    for i in range(tl.load(edges + bag), tl.load(edges + bag + 1)):
        row = rows + tl.load(ids + i) * width
        total += tl.load(weights + i) * tl.load(row + columns, mask=inside, other=0.0)
    tl.store(out + bag * width + columns, total, mask=inside)


@triton.jit
def dots(left_ids, right_ids, left, right, out, width, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    a = left + tl.load(left_ids + i) * width
    b = right + tl.load(right_ids + i) * width
    total = tl.zeros([block], dtype=tl.float32)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        inside = columns < width
        total += tl.load(a + columns, mask=inside, other=0.0) * tl.load(b + columns, mask=inside, other=0.0)
    tl.store(out + i, tl.sum(total, axis=0))
