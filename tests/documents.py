"""Checkers of the documents and of docstrings: each takes one piece and returns what is wrong with it, or None.

Taken apart by `blocks`, `spans`, `command_lines`, `named_commands`, `python_calls`; put to work in tests/test_docs.py.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import shlex
import typing
from collections.abc import Callable, Iterable
from fractions import Fraction
from operator import attrgetter
from pathlib import Path

import benchmarks.__main__
import crosscoders.cli
import diffing.cli
import sae_lora.cli
from crosscoders import InputError
from crosscoders.common.command_line import Command, parse
from crosscoders.training.settings import PRESETS

ROOT = Path(__file__).parent.parent
GUIDE = tuple(f"docs/guide/{path.name}" for path in sorted((ROOT / "docs/guide").glob("*.md")))
NOTEBOOKS = tuple(f"docs/notebooks/{path.name}" for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")))
REFERENCE = tuple(f"docs/reference/{path.name}" for path in sorted((ROOT / "docs/reference").glob("*.md")))
DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/math.md", "docs/formats.md", "docs/performance.md", *GUIDE,
    *REFERENCE, *NOTEBOOKS,
)  # fmt: skip
PROGRAMS = {
    "crosscoders": crosscoders.cli.COMMANDS,
    "sae-lora": sae_lora.cli.COMMANDS,
    "diffing": diffing.cli.COMMANDS,
}
COMMON_FLAGS = {"config", "json", "debug", "print_config", "help"}
BENCHMARK_FLAGS = {"quick", "json", "out"}
PACKAGES = ("crosscoders", "sae_lora", "diffing")
FOLDERS = (*PACKAGES, "benchmarks", "tests", "docs")


def read(name: str) -> str:
    """Return the text of a file of the repository; of a notebook its cells, code in fences and outputs left out."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if not name.endswith(".ipynb"):
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells) + "\n"


# ------------------------------------------------------------------------------------------------------- taking apart


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced code blocks of the given languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def spans(text: str) -> list[str]:
    """Return the inline code outside fenced blocks; one that goes on in the next line is joined."""
    paragraphs = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).split("\n\n")
    return [span for paragraph in paragraphs for span in re.findall(r"`([^`]+)`", re.sub(r"\n *", " ", paragraph))]


def shell_lines(text: str) -> list[str]:
    """Return the lines of shell blocks, continuation lines joined, split at && and without a prompt."""
    lines = "\n".join(blocks(text, "sh", "bash", "console")).replace("\\\n", " ").split("\n")
    return [part.strip().removeprefix("$ ") for line in lines for part in line.split("&&")]


def command_lines(text: str) -> list[str]:
    """Return the calls of our programs in shell blocks."""
    return [line for line in shell_lines(text) if line.split(" ")[0] in PROGRAMS]


def named_commands(text: str) -> list[str]:
    """Return the calls of our programs in inline code."""
    return [span for span in spans(text) if re.match(r"(crosscoders|sae-lora|diffing) [a-z]", span)]


def python_calls(text: str) -> list[str]:
    """Return what follows `python -m` in shell blocks, indented lines and inline code."""
    indented = re.findall(r"^    (.*)$", text, re.M)
    found = (re.search(r"\bpython -m (.+)", line) for line in [*shell_lines(text), *indented, *spans(text)])
    return [match[1] for match in found if match]


def settings_of(kind: type, prefix: str = "") -> set[str]:
    """Return the dotted names of all settings of a dataclass."""
    hints, names = typing.get_type_hints(kind), set()
    for field in dataclasses.fields(kind):
        names.add(prefix + field.name)
        if isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name]):
            names |= settings_of(hints[field.name], f"{prefix}{field.name}.")
    return names


def messages(text: str) -> list[str]:
    """Return the messages of errors that a page explains: lines of bold code."""
    return re.findall(r"^\*\*`(.+)`\*\*$", text, re.M)


# ----------------------------------------------------------------------------------------------- commands and settings


def faults(check: Callable[[str], str | None], pieces: Iterable[str]) -> list[str]:
    """Return what a checker finds wrong in any of the pieces."""
    return [fault for fault in map(check, pieces) if fault]


def find_command(program: str, words: list[str]) -> Command | None:
    """The command that begins a line; its name has one word, or two."""
    named = (command for command in PROGRAMS[program] if words[: len(command.name.split())] == command.name.split())
    return next(named, None)


def wrong_command(line: str) -> str | None:
    """Check that a program has the command and the flags of a line."""
    program, *words = shlex.split(line)
    command = find_command(program, words)
    if command is None:
        return f"{line!r}: {program} has no such command"
    known = settings_of(command.settings) | COMMON_FLAGS | ({"preset"} if command.presets else set())
    for word in words[1:]:
        flag = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and flag not in known:
            return f"{line!r}: no setting {flag!r}"
    return None


def wrong_settings(line: str) -> str | None:
    """Check a complete command line by parsing it as the program would."""
    program, *words = shlex.split(line)
    command = find_command(program, words)
    assert command is not None
    try:
        parse(program, command, words[len(command.name.split()) :])
    except InputError as error:
        return f"{line!r}: {error}"
    return None


def wrong_flag(span: str) -> str | None:
    """Check that a flag belongs to some command or benchmark."""
    flag = re.split(r"[ =]", span)[0].removeprefix("--").replace("-", "_")
    known = COMMON_FLAGS | BENCHMARK_FLAGS | {"preset"}
    known |= {name for names in benchmarks.__main__.OPTIONS.values() for name in names}
    for command in (command for commands in PROGRAMS.values() for command in commands):
        known |= settings_of(command.settings)
    return None if flag in known else f"{span!r}: no command has such a flag"


def wrong_python_call(call: str) -> str | None:
    """Check `MODULE ...` after `python -m`: the module is there, and so are a benchmark and its flags."""
    module, *words = call.split()
    if module.split(".")[0] not in FOLDERS:
        return None
    if importlib.util.find_spec(module) is None:
        return f"python -m {call}: no such module"
    if module != "benchmarks" or not words or words[0] in ("list", "report"):
        return None
    if words[0] != "run" or len(words) < 2:
        return f"python -m {call}: expected run NAME, list or report"
    if words[1] not in {*benchmarks.__main__.BENCHMARKS, "NAME"}:
        return f"python -m {call}: no such benchmark"
    known = BENCHMARK_FLAGS | set(benchmarks.__main__.OPTIONS.get(words[1], ()))
    unknown = [word for word in words if word.startswith("--") and word.removeprefix("--") not in known]
    return f"python -m {call}: {words[1]} takes no {unknown[0]}" if unknown else None


def wrong_make_target(target: str, makefile: str) -> str | None:
    """Check that the makefile has a target."""
    return None if re.search(rf"^{re.escape(target)}:", makefile, re.M) else f"make has no target {target!r}"


# ------------------------------------------------------------------------------------------------- names, links, paths


def wrong_name(dotted: str) -> str | None:
    """Check a dotted name that should be a module, or something in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(value, part):
                return f"{dotted!r}: {'.'.join(parts[:n])} has no {part!r}"
            value = getattr(value, part)
        return None
    return f"{dotted!r}: no such package"


def wrong_link(document: str, target: str) -> str | None:
    """Check that a link leads to a file, and to a heading in it."""
    path, _, anchor = target.partition("#")
    name = ((ROOT / document).parent / path).resolve() if path else ROOT / document
    if not name.exists():
        return f"{document}: there is no {path}"
    headings = re.findall(r"^#+ (.*)$", name.read_text(encoding="utf-8"), re.M) if anchor else []
    slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    return f"{document}: {path or document} has no heading #{anchor}" if anchor and anchor not in slugs else None


def wrong_path(span: str) -> str | None:
    """Check that files of the repository that stand in inline code are there."""
    paths = [word for word in span.split() if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]+", word)]
    missing = [path for path in paths if not (ROOT / path).exists()]
    return f"there is no {missing[0]}" if missing else None


@functools.cache
def literals() -> tuple[str, ...]:
    """Return every string in the code of the packages, `...` for what is filled in."""
    texts = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = (piece.value if isinstance(piece, ast.Constant) else "..." for piece in node.values)
                texts.append("".join(map(str, pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


def wrong_message(message: str) -> str | None:
    """Check that a command can end with a message; `...` in it stands for anything."""
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.S)
    return None if any(map(pattern.search, literals())) else f"no command says {message!r}"


def wrong_index(page: str, index: str) -> str | None:
    """Check that the guide's index links to a page."""
    name = Path(page).name
    return None if name == "README.md" or f"]({name})" in index else f"{page} is not in the index of the guide"


def wrong_python(source: str) -> str | None:
    """Check the syntax, and every name that is imported from a package of ours."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            wrong = [wrong_name(f"{node.module}.{alias.name}") for alias in node.names]
            if any(wrong):
                return next(filter(None, wrong))
    return None


def wrong_public_api(source: str, homes: dict[str, str], public: list[str]) -> str | None:
    """Check that `__all__`, the lazy table and the imports for type checkers say the same."""
    typed = {}
    for_checkers = (block for block in ast.parse(source).body if isinstance(block, ast.If))
    for node in (node for block in for_checkers for node in block.body):
        if isinstance(node, ast.ImportFrom) and node.module and "." in node.module:
            typed |= {alias.name: node.module for alias in node.names}
    if public != sorted(public) or sorted(homes) != public:
        return f"__all__ and the lazy table differ in {sorted(set(public) ^ set(homes)) or 'order'}"
    return None if typed == homes else f"the imports for type checkers differ: {sorted(typed.items() ^ homes.items())}"


# ------------------------------------------------------------------------------------------------------------ contents


def wrong_length(text: str, most: int) -> str | None:
    """Check that a document has at most so many lines."""
    n_lines = len(text.splitlines())
    return f"{n_lines} lines; {most} at most" if n_lines > most else None


def wrong_docstring(source: str) -> str | None:
    """Check that no public docstring begins as the end of a sentence that stands elsewhere."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)):
        name = getattr(node, "name", "the module")
        if not name.startswith("_") and (ast.get_docstring(node) or "").startswith(("Of ", "What of ")):
            return f"{name}: begin with a verb that says what is returned, written or checked"
    return None


def wrong_log(text: str) -> str | None:
    """Check that the entries of the log are dated, newest first, and that each says its verdict."""
    entries = re.split(r"^## ", text, flags=re.M)[1:]
    dates = [entry[:10] for entry in entries]
    undated = [entry.split("\n")[0] for entry in entries if not re.match(r"\d{4}-\d\d-\d\d \w", entry)]
    if undated:
        return f"no date: {undated[0]}"
    silent = [entry.split("\n")[0] for entry in entries if not re.search(r"^\W*Verdict\b", entry, re.M)]
    if silent:
        return f"no verdict: {silent[0]}"
    return None if dates == sorted(dates, reverse=True) else "entries are not newest first"


def preset_table(text: str) -> dict[str, dict[str, str]]:
    """Return setting -> preset -> what the table says."""
    head, *rows = re.search(r"^\| setting \|.*?\n\n", text, re.M | re.S)[0].strip().split("\n")  # type: ignore[index]
    names = [cell.strip(" `") for cell in head.split("|")[2:-1]]
    cells = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows[1:]]
    return {setting: dict(zip(names, values, strict=True)) for setting, *values in cells}


def same_value(shown: str, value: object) -> bool:
    """Compare a cell of the table with the value of a setting."""
    if isinstance(value, str) or value is None:
        return shown == ("none" if value is None else value)
    return float(Fraction(shown.replace(",", ""))) == value


def wrong_presets(text: str) -> list[str]:
    """Return the settings of presets that the table lacks or gives another value."""
    table = preset_table(text)
    command = next(command for command in crosscoders.cli.COMMANDS if command.presets)
    wrong = [f"{key} is missing" for key in {key for preset in PRESETS.values() for key in preset} - set(table)]
    for name in PRESETS:
        settings = parse("crosscoders", command, ["--preset", name, "--cache", "c", "--out", "o"]).settings
        for key, shown in table.items():
            value = attrgetter(key)(settings)
            if not same_value(shown[name], value):
                wrong.append(f"{name}: {key} is {value!r}, the table says {shown[name]!r}")
    return wrong
