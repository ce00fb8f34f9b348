"""Every column of a printed table has its legend: headers go through `legend`, which refuses one without a meaning."""

import ast
import re
from pathlib import Path

import pytest

from crosscoders.common.results import legend

ROOT = Path(__file__).parents[1]
PACKAGES = ("crosscoders", "sae_lora", "diffing")


def headers(tree: ast.AST) -> list[int]:
    """Return the lines of literals that part three titles by spaces, or two by widths, as headers do."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            is_header = len(re.split(r"(?<=\S) {2,}(?=\S)", node.value)) >= 3
        elif isinstance(node, ast.JoinedStr):
            cells = [part for part in node.values if isinstance(part, ast.FormattedValue) and part.format_spec]
            is_header = sum(isinstance(cell.value, ast.Constant) and bool(cell.value.value) for cell in cells) >= 2
        else:
            continue
        lines += [node.lineno] * is_header
    return lines


def n_legends(tree: ast.AST) -> int:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sum(isinstance(call.func, ast.Name) and call.func.id == "legend" for call in calls)


def test_every_table_that_is_printed_has_a_legend() -> None:
    without, with_one = [], 0
    for path in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        n = len(set(headers(tree)))
        with_one += n > 0
        if n > n_legends(tree):
            without.append(f"{path.relative_to(ROOT)}: {headers(tree)}")
    assert not without
    assert with_one >= 9


def test_a_header_without_a_legend_is_seen() -> None:
    for text in ("print(f\"  {'latent':>7}{'change':>9}\")", 'lines = ["  rank  latent  where it fires"]'):
        assert headers(ast.parse(text)) == [1] and n_legends(ast.parse(text)) == 0


def test_a_title_without_a_meaning_and_a_meaning_without_a_title_are_refused() -> None:
    assert legend("  latent    KL closed", {"latent": "number", "KL closed": "share"}) == [
        "  latent: number; KL closed: share"
    ]
    for meanings in ({"latent": "number"}, {"latent": "number", "KL closed": "share", "p": "chance"}):
        with pytest.raises(AssertionError):
            legend("  latent    KL closed", meanings)


def test_a_legend_is_no_wider_than_a_terminal() -> None:
    lines = legend("a  b", {"a": "word " * 30, "b": "other " * 30})
    assert len(lines) > 3 and max(map(len, lines)) <= 80
