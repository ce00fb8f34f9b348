"""Hooks of mkdocs: pages of the repository's root become pages of the site, and links lead to the same page on both.

A link is written as GitHub reads it, from the file that holds it; on the site the pages lie elsewhere.
"""

import posixpath
import re
from typing import Any

ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "LICENSE": "LICENSE.txt",
}
"""Files outside docs/ -> where they lie on the site."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's root to those of docs/."""
    from mkdocs.structure.files import File

    root = posixpath.dirname(config["config_file_path"])
    for source, target in ROOT_PAGES.items():
        files.append(File.generated(config, target, abs_src_path=posixpath.join(root, source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page as the site needs them."""
    return site_links(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Lead the links of a notebook, which mkdocs leaves as they are, to pages of the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def rewritten(match: re.Match[str]) -> str:
        target = files.get_file_from_path(
            posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        )
        return f'href="{target.url_relative_to(page.file)}{match[2]}"' if target else match[0]

    return re.sub(r'href="([^":#]+\.(?:md|ipynb))(#[^"]*|)"', rewritten, html)


def site_links(markdown: str, page: str) -> str:
    """Return the text with each link to a file of the repository led to the page that it is on the site.

    `page` is the page's own place on the site. Links to elsewhere, and headings of the page itself, stay.
    """
    on_site = {target: source for source, target in ROOT_PAGES.items()}
    own = on_site.get(page, f"docs/{page}")

    def rewritten(match: re.Match[str]) -> str:
        path, hash_sign, heading = match[1].partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
        target = ROOT_PAGES.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{hash_sign}{heading})"

    return re.sub(r"\]\(([^)\s]+)\)", rewritten, markdown)
