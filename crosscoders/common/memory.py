"""How much memory the machine has free, and whether a need fits.

`require` compares needs with `ram_room` and `gpu_room` and returns words for the opening line; `keep_large_blocks` lets
malloc reuse large blocks.
"""

import ctypes
import platform
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from crosscoders.common.errors import EnvironmentFault
from crosscoders.common.files import size_text
from crosscoders.common.progress import say


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


class Room(NamedTuple):
    """Bytes of a memory."""

    free: int
    """What this process may still take now."""
    total: int
    """What it could take if nothing else ran."""


def require(needs: list[Need], mend: str, *, force: bool = False) -> str:
    """Check what is needed at once. Returns words for the opening line, such as `1.2 GB of memory (22.1 GB free)`.

    More than is free now is a warning, since other programs may end and estimates are rough; so is more than there is
    at all, with `force`.

    Raises:
        EnvironmentFault: it needs more than there is at all.
    """
    demands = [("memory", sum(need.ram for need in needs), ram_room())]
    for device in {str(need.device): need.device for need in needs if need.device is not None}.values():
        wanted = sum(need.gpu for need in needs if need.device == device)
        demands.append((f"memory on {device}", wanted, gpu_room(device)))
    for where, wanted, room in demands:
        start = f"this needs about {size_text(wanted)} of {where}, but"
        if wanted > room.total and not force:
            raise EnvironmentFault(f"{start} there are {size_text(room.total)}. {mend} --force goes on all the same.")
        if wanted > room.free:
            say(f"warning: {start} {size_text(room.free)} are free. {mend}")
    return ", ".join(
        f"about {size_text(wanted)} of {where} ({size_text(room.free)} free)" for where, wanted, room in demands
    )


def gpu_room(device: torch.device) -> Room:
    """Return the memory of a GPU."""
    return Room(*torch.cuda.mem_get_info(device))


def ram_room() -> Room:
    """Return the memory of the machine, or of the control groups that this process is in where they allow less."""
    machine = psutil.virtual_memory()
    rooms = [Room(machine.available, machine.total), *_group_rooms()]
    return Room(min(room.free for room in rooms), min(room.total for room in rooms))


def _group_rooms() -> list[Room]:
    """Return the room in each control group of this process that has a limit, file cache not counted as used."""
    rooms = []
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
                rooms.append(Room(max(0, int(limit) - int(used) + cached), int(limit)))
    return rooms
