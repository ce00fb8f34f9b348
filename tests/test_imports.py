"""Imports go one way: crosscoders <- sae_lora <- diffing <- benchmarks; and no unsafe loader is called anywhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAIN = ["crosscoders", "sae_lora", "diffing", "benchmarks"]
UNSAFE = [
    (re.compile(r"weights_only\s*=\s*False"), "torch.load without weights_only"),
    (re.compile(r"torch\.load\((?!.*weights_only=True)"), "torch.load without weights_only"),
    (re.compile(r"\bpickle\.loads?\("), "pickle"),
    (re.compile(r"\byaml\.(load|unsafe_load|full_load)\("), "yaml without safe_load"),
    (re.compile(r"trust_remote_code\s*=\s*True"), "remote code"),
    (re.compile(r"(?<![\w.])(eval|exec)\("), "eval or exec"),
]


def upward_imports(source: str, package: str) -> list[str]:
    """Names that a module of `package` imports from packages above it."""
    above = CHAIN[CHAIN.index(package) + 1 :]
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        found += [name for name in names if name.split(".")[0] in above]
    return found


def unsafe_calls(source: str) -> list[str]:
    return [what for pattern, what in UNSAFE if pattern.search(source)]


@pytest.mark.parametrize("package", CHAIN)
def test_no_module_imports_upward(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not upward_imports(path.read_text(), package), path


def test_no_module_unpickles_evaluates_or_trusts_remote_code() -> None:
    for package in CHAIN:
        for path in (ROOT / package).rglob("*.py"):
            assert not unsafe_calls(path.read_text()), path


def test_both_checks_can_fail() -> None:
    assert upward_imports("def f():\n    from diffing.latents.table import x\n", "crosscoders") == [
        "diffing.latents.table"
    ]
    assert upward_imports("import benchmarks.x", "diffing") == ["benchmarks.x"]
    assert unsafe_calls("torch.load(path)") and unsafe_calls("x = eval(text)") and unsafe_calls("yaml.load(f)")
    assert not unsafe_calls("torch.load(path, weights_only=True)") and not unsafe_calls("model.eval()")
