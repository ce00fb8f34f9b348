"""Settings of `diffing report`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportSettings:
    """One self-contained HTML page and one JSON file about a run."""

    run: str
    """Run folder, after `diffing scale`."""
