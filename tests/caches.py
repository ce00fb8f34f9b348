"""What tests compare caches by."""

from pathlib import Path


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != ".lock"}
