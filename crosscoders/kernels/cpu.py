"""The compiled kernels, on tensors.

    select_above, keep_largest, largest_per_token, sort_by_key     sparse
    bags, residual, row_gradients     its products
    spaced, relu_count_, relu_backward_, add_rows_     dense
    row_norms, sum_squares, adam_     the optimiser

Whether they can be used, and how they are built: `kernels.library`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.kernels.library import call, joined, split

BLOCK = 64
"""Columns that the products read at a time; as in cpu.c."""
LANES = 16
"""Values that are worked on at a time; as in cpu.c."""
SUMMED = 1024
"""Values whose squares are added in float32 before float64 takes over; as in cpu.c."""


class Selected(NamedTuple):
    """Chosen entries, ordered by token and latent."""

    tokens: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    scaled: Float[Tensor, " n"]


def select_above(
    products: Float[Tensor, "batch dict_size"],
    bias: Float[Tensor, " dict_size"],
    gate_at: Float[Tensor, " dict_size"],
    weight: Float[Tensor, " dict_size"],
    guess: int,
) -> Selected:
    """Entries with pre_j = products_j + bias_j > gate_at_j, and pre_j weight_j.

    Room is made for `guess` of them, and for more if need be.
    """
    n_tokens, dict_size = products.shape
    columns = bias, gate_at, weight, dict_size

    def run(begin: int, end: int) -> Selected:
        room = guess * (end - begin) // n_tokens + 1
        while True:
            ids = (torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=torch.int64))
            found = Selected(*ids, torch.empty(room), torch.empty(room))
            n = call("select_above", products, products.stride(0), *columns, begin, end, room, *found)
            if n <= room:
                return Selected(*(column[:n] for column in found))
            room = n

    return Selected(*joined(split(n_tokens, run)))


def keep_largest(found: Selected, n: int) -> tuple[Selected, float]:
    """The n entries of largest `scaled`, in order, ties to the earlier ones; and the smallest that is kept.

    Works in place.
    """
    cut = torch.empty(1)
    call("keep_largest", len(found.tokens), n, *found, cut)
    return Selected(*(column[:n] for column in found)), cut.item()


def largest_per_token(
    products: Float[Tensor, "batch dict_size"],
    bias: Float[Tensor, " chosen"],
    weight: Float[Tensor, " chosen"],
    columns: Int[Tensor, " chosen"],
    k: int,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Tokens, places among `columns` and pre_j of each token's k largest positive pre_j weight_j; pre as above."""
    n_tokens, dict_size = products.shape

    def run(begin: int, end: int) -> tuple[Tensor, ...]:
        room = k * (end - begin) + LANES
        found = torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=torch.int64), torch.empty(room)
        sizes, scratch = (dict_size, len(columns), k, begin, end), torch.empty(4 * (len(columns) + LANES))
        n = call("largest_per_token", products, columns, bias, weight, *sizes, *found, scratch)
        return tuple(column[:n] for column in found)

    tokens, places, values = joined(split(n_tokens, run))
    return tokens, places, values


class Sorted(NamedTuple):
    """Entries in stable order of a key."""

    starts: Int[Tensor, " n_keys"]
    """First place of each key."""
    ids: Int[Tensor, " n"]
    values: Float[Tensor, " n"]


def sort_by_key(keys: Int[Tensor, " n"], ids: Int[Tensor, " n"], values: Float[Tensor, " n"], n_keys: int) -> Sorted:
    found = Sorted(torch.empty(n_keys, dtype=torch.int64), torch.empty_like(ids), torch.empty_like(values))
    call("sort_by_key", keys, ids, values, len(keys), n_keys, *found)
    return found


def bags(
    ids: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    starts: Int[Tensor, " bags"],
    rows: Float[Tensor, "rows width"],
    bias: Float[Tensor, " width"] | None = None,
) -> Float[Tensor, "bags width"]:
    """out_b = bias + sum over the entries i of bag b of weights_i rows[ids_i]."""
    n_rows, width = rows.shape
    out = torch.empty(len(starts), width)

    def run(begin: int, end: int) -> int:
        sizes = len(ids), len(starts), rows, n_rows, bias, width, begin, end
        return call("bags", ids, weights, starts, *sizes, out, torch.empty(n_rows * BLOCK))

    split(len(starts), run)
    return out


class Residual(NamedTuple):
    """What the reconstruction from active entries leaves of a goal."""

    left: Float[Tensor, "batch width"]
    """goal - bias - f W"""
    squares: Float[Tensor, "batch n_models"]
    """Squared norm of each model's part of it."""
    dots: Float[Tensor, "n_models n"]
    """Each entry's product of that part, at its token, and of its row of W."""


def residual(
    ids: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    starts: Int[Tensor, " batch"],
    rows: Float[Tensor, "rows width"],
    bias: Float[Tensor, " width"] | None,
    goal: Float[Tensor, "batch width"],
    n_models: int,
    left: Float[Tensor, "batch width"],
) -> Residual:
    """One pass over the rows for all three parts; `left` is where the first is written."""
    n_tokens, (n_rows, width) = len(starts), rows.shape
    found = Residual(left, torch.empty(n_tokens, n_models), torch.empty(n_models, len(ids)))

    def run(begin: int, end: int) -> int:
        sizes = len(ids), n_tokens, rows, n_rows, bias, goal, width, n_models, begin, end
        return call("residuals", ids, weights, starts, *sizes, *found, torch.empty(n_rows * BLOCK))

    split(n_tokens, run)
    return found


class EntrySet(NamedTuple):
    """Active entries with what the loss says of them."""

    tokens: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    columns: Int[Tensor, " chosen"] | None
    """Where latents are counted among these only."""
    values: Float[Tensor, " n"]
    dots: Float[Tensor, "n_models n"]
    scale: Float[Tensor, "batch n_models"]
    """dL/dx_hat is the residual times this."""
    direct: Float[Tensor, " n"] | None
    """What else reaches dL/df."""


class RowGradients(NamedTuple):
    """Gradients of a crosscoder's parameters, latent by latent."""

    W_dec: Float[Tensor, "dict_size width"]
    W_enc: Float[Tensor, "dict_size width"]
    b_enc: Float[Tensor, " dict_size"]
    squares: Float[Tensor, " dict_size"]
    """Sums of the squares of the first two."""


def row_gradients(
    sets: Sequence[EntrySet], left: Float[Tensor, "places width"], x: Float[Tensor, "batch width"], dict_size: int
) -> RowGradients:
    """Over the entries of all sets; `left` holds what each set leaves, one after the other."""
    (n_places, width), n_models = left.shape, sets[0].scale.shape[1]
    cursors, sums = torch.zeros(dict_size, dtype=torch.int64), torch.zeros(dict_size)
    for entries in sets:
        call("count_entries", entries.latents, entries.columns, len(entries.tokens), cursors)
    n = sum(len(entries.tokens) for entries in sets)
    cursors = cursors.cumsum(0).sub_(cursors)
    placed = torch.empty(n, 4)  # place, token, value, gradient
    for number, entries in enumerate(sets):
        tokens, latents, columns, values, dots, scale, direct = entries
        sizes = tokens, latents, columns, values, len(tokens), dots, scale, n_models, direct, number * len(x)
        call("place_entries", *sizes, cursors, sums, placed)
    scales = torch.cat([entries.scale for entries in sets])
    found = torch.empty(dict_size, width), torch.empty(dict_size, width), torch.empty(dict_size)

    def run(begin: int, end: int) -> int:
        sizes = left, n_places, scales, x, len(x), width, n_models, begin, end
        return call("row_gradients", placed, cursors, *sizes, *found, torch.empty((n_places + len(x)) * BLOCK))

    split(dict_size, run)
    return RowGradients(*found[:2], sums, found[2])


def spaced(n_rows: int, width: int) -> Float[Tensor, "rows width"]:
    """Room for a matrix with LANES values between its rows.

    A product that reads columns of a matrix whose rows lie a power of two apart meets few cache sets: 25.8 against
    24.3 ms for f^T y of 1,024 x 4,096 and 1,024 x 512.
    """
    return torch.empty(n_rows, width + LANES)[:, :width]


def relu_count_(
    f: Float[Tensor, "batch dict_size"], bias: Float[Tensor, " dict_size"]
) -> tuple[Float[Tensor, " dict_size"], Float[Tensor, " dict_size"]]:
    """f = max(f + bias, 0) in place; how many entries of each column are positive, and their sums."""
    n_tokens, n = f.shape
    found = torch.empty(n), torch.empty(n)
    split(n, lambda begin, end: call("relu_count", f, f.stride(0), bias, n_tokens, begin, end, *found))
    return found


def relu_backward_(
    gradient: Float[Tensor, "batch dict_size"],
    f: Float[Tensor, "batch dict_size"],
    penalty: Float[Tensor, " dict_size"],
) -> Float[Tensor, " dict_size"]:
    """gradient = (gradient + penalty) where f > 0, else 0, in place; its sums over tokens. Strides: equal."""
    assert gradient.stride() == f.stride()
    n_tokens, n = f.shape
    sums = torch.empty(n)
    split(n, lambda begin, end: call("relu_backward", gradient, f, f.stride(0), penalty, n_tokens, begin, end, sums))
    return sums


def add_rows_(
    gradient: Float[Tensor, "rows width"], factors: Float[Tensor, " rows"], rows: Float[Tensor, "rows width"]
) -> Float[Tensor, " rows"]:
    """gradient_r += factors_r rows_r in place; the sum of the squares of each row that comes of it."""
    squares = torch.empty(len(rows))
    split(len(rows), lambda begin, end: call("add_rows", gradient, factors, rows, rows.shape[1], begin, end, squares))
    return squares


def row_norms(rows: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
    """Euclidean norm of each row."""
    norms = torch.empty(len(rows))

    def run(begin: int, end: int) -> int:
        return call("row_norms", rows, rows.shape[1], begin, end, norms)

    split(len(rows), run)
    return norms


def sum_squares(values: Tensor) -> float:
    """Sum of the squares of all elements."""
    sums = torch.empty(-(-values.numel() // SUMMED), dtype=torch.float64)
    split(len(sums), lambda begin, end: call("sum_squares", values, values.numel(), begin, end, sums))
    return sums.sum().item()


def adam_(
    parameter: Float[Tensor, "*rows width"],
    gradient: Float[Tensor, "*rows width"],
    state: dict[str, Tensor],
    *,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    norms: Float[Tensor, " rows"] | None = None,
) -> None:
    """One step of Adam with gradients times `scale`, on the state of torch.optim.Adam; the equations are its own.

    norms: receives the norms of the new rows.
    """
    step = state["step"].add_(1).item()
    constants = scale, lr, *betas, eps, 1 - betas[0] ** step, 1 - betas[1] ** step
    tensors, width = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"]), parameter.shape[-1]

    def run(begin: int, end: int) -> int:
        return call("adam", *tensors, width, begin, end, *constants, norms)

    split(parameter.numel() // width, run)
