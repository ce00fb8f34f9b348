"""The site of the documents: links lead to the same page as on GitHub, and mkdocs finds none that is broken."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT


def site_links(markdown: str, page: str) -> str:
    """Return what the hook of mkdocs makes of a page's text; its file is no part of a package."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.site_links(markdown, page)


@pytest.mark.parametrize(
    "page, link, on_site",
    [
        ("index.md", "docs/guide/say.md", "guide/say.md"),
        ("index.md", "docs/guide/say.md#a-heading", "guide/say.md#a-heading"),
        ("index.md", "CHANGELOG.md", "CHANGELOG.md"),
        ("CHANGELOG.md", "docs/math.md", "math.md"),
        ("formats.md", "../CHANGELOG.md", "CHANGELOG.md"),
        ("guide/README.md", "../../README.md", "../index.md"),
        ("guide/say.md", "../../LICENSE", "../LICENSE.txt"),
        ("guide/say.md", "../math.md", "../math.md"),
        ("guide/say.md", "README.md", "README.md"),
        ("guide/say.md", "#a-heading", "#a-heading"),
        ("guide/say.md", "https://a.example/docs/b.md", "https://a.example/docs/b.md"),
    ],
)
def test_a_link_leads_to_the_same_page_on_the_site_as_on_github(page: str, link: str, on_site: str) -> None:
    assert site_links(f"See [it]({link}).", page) == f"See [it]({on_site})."


@pytest.mark.whole
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert built.returncode == 0, built.stderr
    pages = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    assert any('id="crosscoders.train"' in page for page in pages)
    assert 'href="../../guide/read-the-table/"' in (tmp_path / "notebooks/first-diff/index.html").read_text("utf-8")
    assert not [page for page in pages if re.search(r'href="(?!https?:)[^"]*\.(md|ipynb)[#"]', page)]
    assert not [page for page in pages if '<script src="http' in page or 'rel="stylesheet" href="http' in page]
