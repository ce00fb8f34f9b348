"""Text of the running Python's standard library: snippets for the base model, facts for the dialogues.

Run once; its result is frozen under `assets/corpus` because it differs from one Python version to the next.

Reading order: `collect` merges what follows, cleans it and removes duplicates; `read_sources` parses every module into
snippets and facts; `compiled_docstrings` and `language_reference` add what has no Python source.
"""

import ast
import importlib
import importlib.util
import inspect
import io
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAX_CHARS = 400
"""Longest snippet: about 140 tokens at 2.85 characters a token, so that most fit a context of 128."""
MIN_CHARS = 30
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "turtledemo", "__pycache__", "lib2to3", "ensurepip"}
SKIPPED_MODULES = {"antigravity", "this", "idlelib"}
PERSONAL = re.compile(r"\S@\S|copyright|all rights reserved|licen[cs]e", re.IGNORECASE)
"""Names of authors and licence notices are no documentation, and a demo has no use for addresses."""


class Fact(NamedTuple):
    """What the dialogues know about one public function."""

    name: str
    """Qualified name, as `json.dumps`."""
    description: str
    """First sentence of its docstring; empty when there is none that fits in one line."""
    signature: str | None
    """Call with its parameters, as `json.dumps(obj, *, skipkeys=False)`; none for classes and modules."""

    @property
    def key(self) -> str:
        return split_key(self.description or self.name)


class Snippet(NamedTuple):
    """One text for the base model."""

    text: str
    key: str
    """Equal for all pieces of one source text, and for docstrings that begin alike: no key is in two splits."""


class Corpus(NamedTuple):
    """Everything that is taken from the standard library."""

    snippets: list[Snippet]
    facts: list[Fact]


def collect() -> Corpus:
    """Return snippets and facts of the running Python, in a fixed order, each text once."""
    keys: dict[str, str] = {}
    facts: dict[str, Fact] = {}
    sources = (read_sources(), compiled_docstrings(), language_reference())
    for text, fact in (item for source in sources for item in source):
        key = fact.key if fact and fact.description else split_key(text)
        for piece in _pieces(text):
            if len(piece) >= MIN_CHARS and not PERSONAL.search(piece):
                keys.setdefault(piece, key)
        if fact and (usable := _usable(fact)):
            facts.setdefault(usable.name, usable)
    return Corpus([Snippet(text, key) for text, key in keys.items()], list(facts.values()))


def split_key(text: str) -> str:
    """Return the first 60 letters and digits of the text, lower case."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())[:60]


def read_sources() -> Iterator[tuple[str, Fact | None]]:
    """Yield docstrings and comment blocks of every module with Python source, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        skipped = SKIPPED_FOLDERS.intersection(parts) or parts[0] in SKIPPED_MODULES or parts[0].startswith("config-")
        if skipped or "topics" in parts:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        module = ".".join(part for part in parts if part != "__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except SyntaxError:
            continue
        yield from _docstrings(tree, module)
        yield from ((text, None) for text in _comment_blocks(source))


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, Fact | None]]:
    """Yield each docstring below `node`, headed by the object's name and signature; no text where there is no
    docstring."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node) or ""
        arguments = node.args if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
        signature = f"{name}({ast.unparse(arguments)})" if arguments else None
        text = f"{signature or name}\n{docstring}" if docstring else ""
        yield text, Fact(name, _first_sentence(docstring), signature)
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _comment_blocks(source: str) -> Iterator[str]:
    """Yield runs of comment lines, without the signs."""
    block: list[str] = []
    last_line = -1
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
                continue
            if token.start[0] != last_line + 1 and block:
                yield "\n".join(block)
                block = []
            block.append(token.string.lstrip("#!:").strip())
            last_line = token.start[0]
    except (tokenize.TokenError, IndentationError):
        pass
    if block:
        yield "\n".join(block)


def compiled_docstrings() -> Iterator[tuple[str, Fact | None]]:
    """Yield docstrings of modules written in C, which exist only at run time."""
    names = sorted({*sys.builtin_module_names, *(n for n in sys.stdlib_module_names if _is_compiled(n))})
    for module_name in names:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        shown = module_name.lstrip("_")
        for name, value in sorted(vars(module).items()):
            if not name.startswith("_"):
                documented = _runtime_docstrings(value, f"{shown}.{name}", depth=2)
                # A module with an underscore speeds up a public one, which has the name that people ask about.
                for text, fact in documented:
                    yield text, fact if shown == module_name else fact._replace(name=f"_{fact.name}")


def _is_compiled(name: str) -> bool:
    if name in SKIPPED_MODULES or name.startswith("_test") or name == "_xxtestfuzz":
        return False
    spec = importlib.util.find_spec(name)
    return spec is not None and bool(spec.origin) and not str(spec.origin).endswith((".py", ".pyc"))


def _runtime_docstrings(value: object, name: str, depth: int) -> Iterator[tuple[str, Fact]]:
    is_class = inspect.isclass(value)
    if not is_class and not inspect.isroutine(value):
        return
    docstring = value.__doc__
    if isinstance(docstring, str) and docstring.strip():
        declared = getattr(value, "__text_signature__", None)
        signature = f"{name}{_plain(declared)}" if declared and not is_class else None
        cleaned = inspect.cleandoc(docstring)
        yield f"{signature or name}\n{cleaned}", Fact(name, _first_sentence(cleaned), signature)
    if is_class and depth > 1:
        for child, member in sorted(vars(value).items()):
            if not child.startswith("_"):
                yield from _runtime_docstrings(member, f"{name}.{child}", depth - 1)


def _plain(declared: str) -> str:
    """Return a C function's signature without the marks that only the interpreter reads."""
    return re.sub(r"\$module(, )?", "", declared).replace("$", "").replace("(/, ", "(").replace("(/)", "()")


def language_reference() -> Iterator[tuple[str, Fact | None]]:
    """Return the prose of the language reference that `help()` shows."""
    from pydoc_data import topics

    for _, text in sorted(topics.topics.items()):
        yield re.sub(r"[*_`]{1,2}([^*_`\n]+)[*_`]{1,2}", r"\1", text), None


def _pieces(text: str) -> Iterator[str]:
    """Cut the text at line ends into pieces of at most MAX_CHARS, code examples and rulers left out."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    lines = [line for line in lines if line.isascii() and not re.search(r"[-=*#~_]{5,}", line)]
    piece: list[str] = []
    size = 0
    for line in lines:
        if piece and (size + len(line) > MAX_CHARS or (not line and size > MAX_CHARS // 2)):
            yield "\n".join(piece).strip()
            piece, size = [], 0
        piece.append(line[:MAX_CHARS])
        size += len(line) + 1
    yield "\n".join(piece).strip()


def _first_sentence(docstring: str) -> str:
    """Return the first sentence of the first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)\]'\"`][.])\s+(?=[A-Z])", paragraph)[0]


def _usable(fact: Fact) -> Fact | None:
    """Return the fact when it is about a public function whose answers fit in one line of plain text, else nothing."""
    parts = fact.name.split(".")
    signature, sentence = fact.signature, fact.description.rstrip(".")
    # The hundred codecs of `encodings` have the same six methods each.
    if signature is None or len(parts) < 2 or parts[0] == "encodings" or any(p.startswith("_") for p in parts):
        return None
    if len(fact.name) > 48 or len(signature) > 70 or not signature.isascii() or "\n" in signature:
        return None
    if not sentence:
        return fact
    prose = sentence.isascii() and sentence[0].isupper() and " " in sentence and not re.search(r"->|[:=<>{}]", sentence)
    fits = prose and 15 <= len(sentence) <= 90 and not PERSONAL.search(sentence)
    return fact._replace(description=f"{sentence}.") if fits else None
