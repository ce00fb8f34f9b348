"""How much memory the machine has free, and whether a need fits.

`require` compares needs with `ram_room` and `gpu_room` and returns words for the opening line; `keep_large_blocks` lets
malloc reuse large blocks.
"""

import ctypes
import platform
from typing import NamedTuple

import torch

from crosscoders.common.errors import EnvironmentFault
from crosscoders.common.files import size_text
from crosscoders.common.progress import say
from crosscoders.common.room import Room, ram_room


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
