"""Settings of `diffing doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DoctorSettings:
    """What this machine has, and what it can run; nothing is loaded or fetched."""

    folder: str = "."
    """Folder whose disk is looked at."""
