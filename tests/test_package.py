"""What is built for others: the wheel and the sdist hold every file, and the citation agrees with the package."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("crosscoders", "sae_lora", "diffing")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def package_files() -> set[str]:
    """Files of the packages, modules and data: pages, templates, models and documents of the demo."""
    found = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_the_packages() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    included = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    assert included == package_files()
    assert {Path(name).suffix for name in included} >= {".j2", ".js", ".css", ".html", ".jinja", ".safetensors", ".gz"}


@pytest.mark.whole
def test_the_wheel_alone_runs_in_an_empty_folder(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    (empty := tmp_path / "empty").mkdir()
    script = (
        "import diffing, sae_lora, crosscoders\nfrom diffing.cli import main\n"
        "from diffing.demo import document_file, model_folder\n"
        "for part in (diffing, sae_lora, crosscoders): print(part.__file__)\n"
        "for name in ('base', 'tuned', 'placebo', 'format_only'): print(model_folder(name) / 'model.safetensors')\n"
        "for name in ('raw_train', 'dialogues_heldout'): print(document_file(name))\n"
        "assert not main(['doctor'])"
    )
    env = dict(os.environ) | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=True)
    files = [Path(line) for line in done.stdout.splitlines()[:9]]
    assert all(file.is_file() and file.is_relative_to(tmp_path / "site") for file in files)
    assert "model-diffing 0.1.0" in done.stdout and not any(empty.iterdir())


def test_the_sdist_holds_what_is_built_tested_and_read() -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling is not installed")
    included = {file.distribution_path for file in sdist.SdistBuilder(str(ROOT)).recurse_included_files()}
    assert package_files() <= included
    assert {"Makefile", "constraints.txt", "CITATION.cff", "tests/conftest.py", "docs/formats.md"} <= included


def test_the_citation_names_this_package_and_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    for key, value in (("title", PROJECT["name"]), ("version", PROJECT["version"]), ("license", PROJECT["license"])):
        assert str(citation[key]) == value
    assert citation["keywords"] == PROJECT["keywords"]
