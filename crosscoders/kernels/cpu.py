"""The C kernels of cpu.c, built once per machine with its C compiler and kept in the user's cache folder.

    library      the loaded functions, or None where they cannot be had; `state` says which and why
    select_above, keep_largest, largest_per_token, sort_by_key     sparse, on tensors
    bags, residual, row_gradients     their products
    relu_count_, relu_backward_     dense
    row_norms, sum_squares, adam_     the optimiser
    keep_large_blocks     lets malloc reuse large blocks instead of mapping fresh pages each step

Without a compiler, or with MODEL_DIFFING_KERNELS=torch, `crosscoders.sparse` uses torch and numpy: the same results
within rounding, and the same selections exactly.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
BLOCK = 64
"""Columns that the products read at a time; as in cpu.c."""
LANES = 16
"""Values that are worked on at a time; as in cpu.c."""
SUMMED = 1024
"""Values whose squares are added in float32 before float64 takes over; as in cpu.c."""


class Library:
    """The loaded functions, or why there are none."""

    def __init__(self) -> None:
        self.functions: ctypes.CDLL | None = None
        if os.environ.get("MODEL_DIFFING_KERNELS") == "torch":
            self.state = "torch (MODEL_DIFFING_KERNELS)"
            return
        try:
            self.functions = ctypes.CDLL(str(_built()))
            self.state = "compiled"
        except (OSError, subprocess.CalledProcessError) as error:
            detail = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else ""
            self.state = f"torch ({(detail.strip() or str(error)).splitlines()[0]})"
            return
        self.functions.select_above.restype = self.functions.largest_per_token.restype = ctypes.c_int64


@functools.cache
def library() -> Library:
    """Built on first use."""
    return Library()


def _built() -> Path:
    """Path of the shared object for this source, compiler and processor; compiled when it is not there yet."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("no C compiler found")
    # A home folder may serve machines with other processors, and -march=native is right for one kind only.
    processor = Path("/proc/cpuinfo")
    flags = (
        [line for line in processor.read_text().splitlines() if line.startswith("flags")] if processor.exists() else []
    )
    key = "\n".join([SOURCE.read_text(), compiler, *FLAGS, platform.machine(), *flags[:1]])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "model-diffing" / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True)
            os.replace(made, path)
    return path


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions can take these tensors: float32 or int64 on a CPU, contiguous."""
    return library().functions is not None and all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64) and t.is_contiguous() for t in tensors
    )


def _call(name: str, *arguments: Tensor | int | float | None) -> int:
    found: int = getattr(library().functions, name)(*map(_argument, arguments))
    return found


def _argument(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernels")


Result = TypeVar("Result")


def _split(n: int, run: Callable[[int, int], Result]) -> list[Result]:
    """run(begin, end) over as many ranges as torch has threads; foreign calls release the interpreter's lock."""
    n_threads = min(torch.get_num_threads(), n)
    if n_threads <= 1:
        return [run(0, n)]
    edges = [n * i // n_threads for i in range(n_threads + 1)]
    return list(_pool(n_threads).map(run, edges[:-1], edges[1:]))


def _joined(parts: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The columns of several parts, end to end."""
    return parts[0] if len(parts) == 1 else [torch.cat(columns) for columns in zip(*parts, strict=True)]


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

    def run(begin: int, end: int) -> Selected:
        room = guess * (end - begin) // n_tokens + 1
        while True:
            ids = (torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=torch.int64))
            found = Selected(*ids, torch.empty(room), torch.empty(room))
            n = _call("select_above", products, bias, gate_at, weight, dict_size, begin, end, room, *found)
            if n <= room:
                return Selected(*(column[:n] for column in found))
            room = n

    return Selected(*_joined(_split(n_tokens, run)))


def keep_largest(found: Selected, n: int) -> tuple[Selected, float]:
    """The n entries of largest `scaled`, in order, ties to the earlier ones; and the smallest that is kept.

    Works in place.
    """
    cut = torch.empty(1)
    _call("keep_largest", len(found.tokens), n, *found, cut)
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
        n = _call("largest_per_token", products, columns, bias, weight, *sizes, *found, scratch)
        return tuple(column[:n] for column in found)

    tokens, places, values = _joined(_split(n_tokens, run))
    return tokens, places, values


class Sorted(NamedTuple):
    """Entries in stable order of a key."""

    starts: Int[Tensor, " n_keys"]
    """First place of each key."""
    ids: Int[Tensor, " n"]
    values: Float[Tensor, " n"]


def sort_by_key(keys: Int[Tensor, " n"], ids: Int[Tensor, " n"], values: Float[Tensor, " n"], n_keys: int) -> Sorted:
    found = Sorted(torch.empty(n_keys, dtype=torch.int64), torch.empty_like(ids), torch.empty_like(values))
    _call("sort_by_key", keys, ids, values, len(keys), n_keys, *found)
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
        return _call("bags", ids, weights, starts, *sizes, out, torch.empty(n_rows * BLOCK))

    _split(len(starts), run)
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
        return _call("residuals", ids, weights, starts, *sizes, *found, torch.empty(n_rows * BLOCK))

    _split(n_tokens, run)
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
        _call("count_entries", entries.latents, entries.columns, len(entries.tokens), cursors)
    n = sum(len(entries.tokens) for entries in sets)
    cursors = cursors.cumsum(0).sub_(cursors)
    placed = torch.empty(n, 4)  # place, token, value, gradient
    for number, entries in enumerate(sets):
        tokens, latents, columns, values, dots, scale, direct = entries
        sizes = tokens, latents, columns, values, len(tokens), dots, scale, n_models, direct, number * len(x)
        _call("place_entries", *sizes, cursors, sums, placed)
    scales = torch.cat([entries.scale for entries in sets])
    found = torch.empty(dict_size, width), torch.empty(dict_size, width), torch.empty(dict_size)

    def run(begin: int, end: int) -> int:
        sizes = left, n_places, scales, x, len(x), width, n_models, begin, end
        return _call("row_gradients", placed, cursors, *sizes, *found, torch.empty((n_places + len(x)) * BLOCK))

    _split(dict_size, run)
    return RowGradients(*found[:2], sums, found[2])


def relu_count_(
    f: Float[Tensor, "batch dict_size"], bias: Float[Tensor, " dict_size"]
) -> tuple[Float[Tensor, " dict_size"], Float[Tensor, " dict_size"]]:
    """f = max(f + bias, 0) in place; how many entries of each column are positive, and their sums."""
    found = torch.empty(f.shape[1]), torch.empty(f.shape[1])
    _split(f.shape[1], lambda begin, end: _call("relu_count", f, bias, *f.shape, begin, end, *found))
    return found


def relu_backward_(
    gradient: Float[Tensor, "batch dict_size"],
    f: Float[Tensor, "batch dict_size"],
    penalty: Float[Tensor, " dict_size"],
) -> Float[Tensor, " dict_size"]:
    """gradient = (gradient + penalty) where f > 0, else 0, in place; its sums over tokens."""
    sums = torch.empty(f.shape[1])
    _split(f.shape[1], lambda begin, end: _call("relu_backward", gradient, f, penalty, *f.shape, begin, end, sums))
    return sums


def row_norms(rows: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
    """Euclidean norm of each row."""
    norms = torch.empty(len(rows))

    def run(begin: int, end: int) -> int:
        return _call("row_norms", rows, rows.shape[1], begin, end, norms)

    _split(len(rows), run)
    return norms


def sum_squares(values: Tensor) -> float:
    """Sum of the squares of all elements."""
    sums = torch.empty(-(-values.numel() // SUMMED), dtype=torch.float64)
    _split(len(sums), lambda begin, end: _call("sum_squares", values, values.numel(), begin, end, sums))
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
        return _call("adam", *tensors, width, begin, end, *constants, norms)

    _split(parameter.numel() // width, run)


def keep_large_blocks() -> None:
    """Have glibc keep freed blocks of up to 1 GiB for reuse, for the rest of this process.

    By default it gives blocks above 32 MiB back to the kernel at once, and every step pays for zeroed pages again
    (first touch runs at 2.6 GB/s where reuse runs at 18). Elsewhere than on glibc nothing is changed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
