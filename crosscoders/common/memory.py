"""How much memory the machine has free, and whether a need fits.

`require` compares needs with `free_ram` and `free_gpu` and returns words for the opening line; `keep_large_blocks` lets
malloc reuse large blocks.
"""

import ctypes
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from crosscoders.common.errors import EnvironmentFault
from crosscoders.common.files import size_text


def keep_large_blocks() -> None:
    """Have glibc keep freed blocks of up to 1 GiB for reuse, for the rest of this process.

    By default it gives blocks above 32 MiB back to the kernel at once, and every step pays for zeroed pages again
    (first touch runs at 2.6 GB/s where reuse runs at 18). Elsewhere than on glibc nothing is changed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


PROCESS_BYTES = 150_000_000
"""Modules and allocators that grow once models run (measured on a pair of 1 M parameters)."""


class Need(NamedTuple):
    """Bytes beyond what the process holds now."""

    ram: int
    gpu: int = 0
    device: torch.device | None = None
    """Of `gpu`; None where everything is in RAM."""


def require(needs: list[Need], mend: str) -> str:
    """Check what is needed at once. Returns words for the opening line, such as `1.2 GB of memory (22.1 GB free)`.

    Raises:
        EnvironmentFault: it needs more than there is.
    """
    found = [("memory", sum(need.ram for need in needs), free_ram())]
    for device in {str(need.device): need.device for need in needs if need.device is not None}.values():
        wanted = sum(need.gpu for need in needs if need.device == device)
        found.append((f"memory on {device}", wanted, free_gpu(device)))
    for where, wanted, free in found:
        if free is not None and wanted > free:
            raise EnvironmentFault(
                f"this needs about {size_text(wanted)} of {where}, but {size_text(free)} are free. {mend}"
            )
    return ", ".join(
        f"about {size_text(wanted)} of {where}" + (f" ({size_text(free)} free)" if free is not None else "")
        for where, wanted, free in found
    )


def free_gpu(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def free_ram() -> int | None:
    """Bytes that this process may still take: of the machine, and of the control groups it is in; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min([free, *_group_limits()])


def _group_limits() -> list[int]:
    """What is left in each control group of this process, file cache not counted as used."""
    found = []
    try:
        entries = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for entry in entries:
        _, kinds, path = entry.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        # Version 2 has one tree and no kinds, version 1 a tree for each kind.
        root = Path("/sys/fs/cgroup", *(["memory"] if kinds else []))
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
                found.append(max(0, int(limit) - int(used) + cached))
    return found
