"""Runs the notebooks of the documents. As a program (`make notebooks`) it writes their outputs anew."""

import os
import tempfile
from pathlib import Path
from typing import Any

from documents import NOTEBOOKS, ROOT


def executed(notebook: str, folder: Path) -> Any:
    """Return a notebook after all of its cells ran in `folder`, with what they printed and returned.

    Warnings and lines of progress, which hold times and paths, are left out.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    opened = nbformat.read(ROOT / notebook, as_version=4)
    places = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(folder / "ipython"),
        "HF_HUB_OFFLINE": "1",
    }
    client = NotebookClient(
        opened,
        timeout=600,
        startup_timeout=300,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | places)
    for cell in opened["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    opened["metadata"]["language_info"] = {"name": "python"}  # in place of the version that ran here
    return opened


if __name__ == "__main__":
    import nbformat

    for notebook in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(notebook, Path(folder)), ROOT / notebook)
