"""`diffing report`, as a function of its settings that returns a JSON object."""

from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from diffing.report.publishing import write_report
from diffing.report.settings import ReportSettings


def report(settings: ReportSettings) -> dict[str, Any]:
    """Run `diffing report`."""
    written = write_report(Path(settings.run))
    say(f"report: {written.html} ({files.size_text(written.html.stat().st_size)}), {written.json}")
    described: dict[str, Any] = files.read_model(written.json, Record)
    return described
