"""The C kernels of cpu.c, built once per machine with its C compiler and kept in the user's cache folder.

    library      the loaded functions, or None where they cannot be had; `state` says which and why
    usable, usable_rows     whether they take given tensors
    call, split     run one of them, over ranges on as many threads as torch has
    keep_large_blocks     lets malloc reuse large blocks instead of mapping fresh pages each step

`kernels.cpu` has the functions themselves. Without a compiler, or with MODEL_DIFFING_KERNELS=torch, the callers use
torch and numpy: the same results within rounding, and the same selections exactly.
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
from typing import Any, TypeVar

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")


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


def usable_rows(matrix: Tensor) -> bool:
    """Whether select_above and the ReLU kernels can take it: float32 on a CPU, each row contiguous."""
    return library().functions is not None and (matrix.device.type, matrix.dtype, matrix.stride(1)) == (
        "cpu",
        torch.float32,
        1,
    )


def call(name: str, *arguments: Tensor | int | float | None) -> int:
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


def split(n: int, run: Callable[[int, int], Result]) -> list[Result]:
    """run(begin, end) over as many ranges as torch has threads; foreign calls release the interpreter's lock."""
    n_threads = min(torch.get_num_threads(), n)
    if n_threads <= 1:
        return [run(0, n)]
    edges = [n * i // n_threads for i in range(n_threads + 1)]
    return list(_pool(n_threads).map(run, edges[:-1], edges[1:]))


def joined(parts: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The columns of several parts, end to end."""
    return parts[0] if len(parts) == 1 else [torch.cat(columns) for columns in zip(*parts, strict=True)]
