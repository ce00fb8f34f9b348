"""How much memory the machine has free, without torch: `ram_room`."""

from pathlib import Path
from typing import NamedTuple

import psutil


class Room(NamedTuple):
    """Bytes of a memory."""

    free: int
    """What this process may still take now."""
    total: int
    """What it could take if nothing else ran."""


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
