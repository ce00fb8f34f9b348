"""Step 5 of the data flow: a run folder -> report.html, one file that needs no network, and report.json beside it.

`data` reads and checks, `summary` counts, `figures` and `curves` bin, `render` fills in, `write_report` publishes.
"""

from pathlib import Path
from typing import NamedTuple

from crosscoders.common.files import write_bytes, write_json
from diffing.latents.nulls import read_nulls
from diffing.report.cards import read_details
from diffing.report.causes import read_causal
from diffing.report.comparison import compare_section
from diffing.report.data import read_run
from diffing.report.decomposition import decomposition_section
from diffing.report.render import render_html, render_json, render_methods, table_rows
from diffing.report.samples import read_replies, read_say
from diffing.report.sections import Section, sae_section
from diffing.report.topk_lora import topk_section


class ReportFiles(NamedTuple):
    """The files that were written."""

    html: Path
    """The page."""
    json: Path
    """The same numbers as data."""


READERS = {
    "topk-run.json": topk_section,
    "sae.json": sae_section,
    "compare.json": compare_section,
    "decomposition.json": decomposition_section,
}
"""File of another method's folder -> what makes a section of that folder."""


def read_sections(run: Path) -> list[Section]:
    """Return the sections of the methods whose results are in the run folder or directly inside it.

    Raises:
        CorruptData: a file of theirs is damaged.
    """
    folders = [run, *sorted(path for path in run.iterdir() if path.is_dir())] if run.is_dir() else []
    return [
        read(folder, place)
        for name, read in READERS.items()
        for place, folder in enumerate(folders)
        if (folder / name).is_file()
    ]


def write_report(run: Path, *, html: Path | None = None, json: Path | None = None) -> ReportFiles:
    """Write RUN/report.html and RUN/report.json, or the given files. Equal runs give equal bytes. A folder without a
    crosscoder gets a page about the other methods in it.

    Raises:
        InputError: RUN has no latents.json, or one of its files lacks something; the message names it.
        CorruptData: a file of RUN is not JSON.
        EnvironmentFault: a file cannot be written.
    """
    files = ReportFiles(html or run / "report.html", json or run / "report.json")
    sections = read_sections(run)
    if sections and not (run / "latents.json").is_file():
        write_bytes(files.html, render_methods(sections))
        write_json(files.json, {"name": "report", "rows": [entry for section in sections for entry in section.rows]})
        return files
    read = read_run(run)._replace(
        nulls=read_nulls(run), causal=read_causal(run), say=read_say(run), replies=read_replies(run), sections=sections,
        details=read_details(run),
    )  # fmt: skip
    rows = table_rows(read)
    write_bytes(files.html, render_html(read, rows))
    write_json(files.json, render_json(read, rows))
    return files
