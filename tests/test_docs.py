"""The documents: every command, flag, function, link and example that they name exists, and every checker can fail."""

import ast
import dataclasses
import importlib
import re
import shlex
import typing
from collections.abc import Callable
from fractions import Fraction
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import crosscoders.cli
import diffing.cli
import sae_lora.cli
from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, InputError
from crosscoders.common.command_line import Command, parse
from crosscoders.training.settings import PRESETS
from diffing.latents.verdict import VERDICTS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/math.md", "docs/formats.md", "docs/performance.md")
PROGRAMS = {
    "crosscoders": crosscoders.cli.COMMANDS,
    "sae-lora": sae_lora.cli.COMMANDS,
    "diffing": diffing.cli.COMMANDS,
}
COMMON_FLAGS = {"config", "json", "debug", "print_config", "help"}
PACKAGES = ("crosscoders", "sae_lora", "diffing")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- taking apart


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced code blocks of the given languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def spans(text: str) -> list[str]:
    """Inline code outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def command_lines(text: str) -> list[str]:
    """Lines of shell blocks, continuation lines joined, split at && and without a prompt."""
    lines = "\n".join(blocks(text, "sh", "bash", "console")).replace("\\\n", " ").split("\n")
    parts = [part.strip().removeprefix("$ ") for line in lines for part in line.split("&&")]
    return [part for part in parts if part.split(" ")[0] in PROGRAMS]


def named_commands(text: str) -> list[str]:
    """Commands of our programs in inline code."""
    return [span for span in spans(text) if re.match(r"(crosscoders|sae-lora|diffing) [a-z]", span)]


def settings_of(kind: type, prefix: str = "") -> set[str]:
    """Dotted names of all settings of a dataclass."""
    hints, found = typing.get_type_hints(kind), set()
    for field in dataclasses.fields(kind):
        found.add(prefix + field.name)
        if isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name]):
            found |= settings_of(hints[field.name], f"{prefix}{field.name}.")
    return found


# ----------------------------------------------------------------------------------------------------------- checkers
# Each takes one piece of a document and returns what is wrong with it, or None.


def wrong_command(line: str) -> str | None:
    program, *words = shlex.split(line)
    commands: dict[str, Command] = {command.name: command for command in PROGRAMS[program]}
    if not words or words[0] not in commands:
        return f"{line!r}: {program} has no such command"
    command = commands[words[0]]
    known = settings_of(command.settings) | COMMON_FLAGS | ({"preset"} if command.presets else set())
    for word in words[1:]:
        flag = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and flag not in known:
            return f"{line!r}: no setting {flag!r}"
    return None


def wrong_settings(line: str) -> str | None:
    """A complete command line, parsed as the program would."""
    program, name, *argv = shlex.split(line)
    command = next(command for command in PROGRAMS[program] if command.name == name)
    try:
        parse(program, command, argv)
    except InputError as error:
        return f"{line!r}: {error}"
    return None


def wrong_flag(span: str) -> str | None:
    flag = re.split(r"[ =]", span)[0].removeprefix("--").replace("-", "_")
    known = COMMON_FLAGS | {
        "preset",
        "quick",
        "only",
        "peers",
        "checkout",
        "runs",
    }  # from quick on: python -m benchmarks
    for command in (command for commands in PROGRAMS.values() for command in commands):
        known |= settings_of(command.settings)
    return None if flag in known else f"{span!r}: no command has such a flag"


def wrong_name(dotted: str) -> str | None:
    """A dotted name that should be a module, or something in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                return f"{dotted!r}: {'.'.join(parts[:n])} has no {part!r}"
            found = getattr(found, part)
        return None
    return f"{dotted!r}: no such package"


def wrong_link(document: str, target: str) -> str | None:
    path, _, anchor = target.partition("#")
    name = ((ROOT / document).parent / path).resolve() if path else ROOT / document
    if not name.exists():
        return f"{document}: there is no {path}"
    headings = re.findall(r"^#+ (.*)$", name.read_text(encoding="utf-8"), re.M) if anchor else []
    slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    return f"{document}: {path or document} has no heading #{anchor}" if anchor and anchor not in slugs else None


def wrong_python(source: str) -> str | None:
    """Syntax, and every name that is imported from a package of ours."""
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


def wrong_make_target(target: str, makefile: str) -> str | None:
    return None if re.search(rf"^{re.escape(target)}:", makefile, re.M) else f"make has no target {target!r}"


def wrong_public_api(source: str, homes: dict[str, str], public: list[str]) -> str | None:
    """`__all__`, the lazy table and the imports for type checkers must say the same."""
    typed = {}
    for_checkers = (block for block in ast.parse(source).body if isinstance(block, ast.If))
    for node in (node for block in for_checkers for node in block.body):
        if isinstance(node, ast.ImportFrom) and node.module and "." in node.module:
            typed |= {alias.name: node.module for alias in node.names}
    if public != sorted(public) or sorted(homes) != public:
        return f"__all__ and the lazy table differ in {sorted(set(public) ^ set(homes)) or 'order'}"
    return None if typed == homes else f"the imports for type checkers differ: {sorted(typed.items() ^ homes.items())}"


def preset_table(text: str) -> dict[str, dict[str, str]]:
    """Setting -> preset -> what the table says."""
    head, *rows = re.search(r"^\| setting \|.*?\n\n", text, re.M | re.S)[0].strip().split("\n")  # type: ignore[index]
    names = [cell.strip(" `") for cell in head.split("|")[2:-1]]
    cells = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows[1:]]
    return {setting: dict(zip(names, values, strict=True)) for setting, *values in cells}


def same_value(shown: str, value: object) -> bool:
    if isinstance(value, str) or value is None:
        return shown == ("none" if value is None else value)
    return float(Fraction(shown.replace(",", ""))) == value


def wrong_presets(text: str) -> list[str]:
    """Settings of a preset that the table lacks or gives another value."""
    table = preset_table(text)
    command = next(command for command in crosscoders.cli.COMMANDS if command.presets)
    found = [f"{key} is missing" for key in {key for preset in PRESETS.values() for key in preset} - set(table)]
    for name in PRESETS:
        settings = parse("crosscoders", command, ["--preset", name, "--cache", "c", "--out", "o"]).settings
        for key, shown in table.items():
            value = attrgetter(key)(settings)
            if not same_value(shown[name], value):
                found.append(f"{name}: {key} is {value!r}, the table says {shown[name]!r}")
    return found


def faults(check: Callable[[str], str | None], pieces: list[str]) -> list[str]:
    return [fault for fault in map(check, pieces) if fault]


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_flag_in_the_documents_exists(document: str) -> None:
    text = read(document)
    assert not faults(wrong_command, command_lines(text) + named_commands(text))
    assert not faults(wrong_flag, [span for span in spans(text) if re.match(r"--[a-z]", span)])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_command_lines_in_the_documents_are_accepted_with_their_values(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(read(document), "yaml"):  # the first line is a comment with the file's name
        Path(block.split("\n")[0].removeprefix("# ")).write_text(block)
    assert not faults(wrong_settings, command_lines(read(document)))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_and_function_in_the_documents_exists(document: str) -> None:
    names = [span for span in spans(read(document)) if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", span)]
    assert not faults(wrong_name, names)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_inside_the_repository_lead_somewhere(document: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", read(document)) if "://" not in link]
    assert not faults(lambda link: wrong_link(document, link), links)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_in_the_documents_exist(document: str) -> None:
    targets = [span.split()[1] for span in spans(read(document)) if re.fullmatch(r"make [\w-]+", span)]
    assert not faults(lambda target: wrong_make_target(target, read("Makefile")), targets)


def test_the_python_examples_compile_and_import_what_exists() -> None:
    examples = [block for document in DOCUMENTS for block in blocks(read(document), "python")]
    assert len(examples) >= 2
    assert not faults(wrong_python, examples)


def test_the_python_examples_of_the_readme_run(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/gemma").mkdir(parents=True)
    Path("runs/gemma/cache").symlink_to(cache_folder)
    shape = CrosscoderConfig(dict_size=24, activation="relu", d_model=ActivationCache(cache_folder).d_model)
    crosscoder = Crosscoder(shape)
    crosscoder.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    crosscoder.save("runs/gemma/run")
    for block in blocks(read("README.md"), "python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "relative_decoder_norm" in capsys.readouterr().out
    assert Path("runs/mine/model.safetensors").is_file()


def test_the_documents_name_every_verdict_and_every_field_of_a_cache_and_a_crosscoder(cache_folder: Path) -> None:
    assert set(VERDICTS) <= {part for span in spans(read("docs/math.md")) for part in span.split(", ")}
    cache = ActivationCache(cache_folder)
    named = set(spans(read("docs/formats.md")))
    keys = {*cache.manifest, *cache.manifest["statistics"], *cache.manifest["counts"], *cache.manifest["shards"][0]}
    tensors = {*cache.shard(0)._fields, *Crosscoder(CrosscoderConfig(2, k=1, d_model=2)).state_dict()}
    assert keys | tensors <= named, sorted((keys | tensors) - named)


def test_the_table_of_presets_has_the_values_of_the_code() -> None:
    text = read("docs/math.md")
    assert not wrong_presets(text)
    assert wrong_presets(text.replace("| 0.041 |", "| 0.036 |"))
    assert wrong_presets(re.sub(r"\| `l1_coefficient` .*\n", "", text))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_api_is_one_list(package: str) -> None:
    module = importlib.import_module(package)
    source = read(f"{package}/__init__.py")
    assert wrong_public_api(source, module._HOMES, module.__all__) is None
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert wrong_name(f"{module._HOMES[name]}.{name}") is None
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = module.no_such_name


# --------------------------------------------------------------------------------------------------------------- meta


@pytest.mark.parametrize(
    "check, planted",
    [
        (wrong_command, "crosscoders bake --base x"),
        (wrong_command, "crosscoders cache --bass x"),
        (wrong_command, "crosscoders train --crosscoder.dictsize 4"),
        (wrong_command, "diffing scale RUN --preset demo"),
        (wrong_settings, "crosscoders train --cache c --out o --crosscoder.k many"),
        (wrong_settings, "crosscoders cache --base x"),
        (wrong_flag, "--no-such-flag"),
        (wrong_name, "crosscoders.dictionary.metrics.explained"),
        (wrong_name, "crosscoders.no_such_module"),
        (wrong_name, "crosscoders.dictionary.crosscoder.Crosscoder.encoder"),
        (wrong_python, "def f(:"),
        (wrong_python, "from crosscoders import no_such_name"),
        (lambda link: wrong_link("README.md", link), "docs/nothing.md"),
        (lambda link: wrong_link("README.md", link), "docs/math.md#no-such-heading"),
        (lambda target: wrong_make_target(target, "all:\n\ttrue\n"), "demo"),
        (lambda source: wrong_public_api(source, {"A": "diffing.a"}, ["A", "B"]), "from diffing.a import A"),
        (lambda source: wrong_public_api(source, {"A": "diffing.a"}, ["A"]), "from diffing.b import A"),
    ],
)
def test_each_checker_finds_a_planted_fault(check: Callable[[str], str | None], planted: str) -> None:
    assert check(planted)


def test_commands_are_found_in_blocks_and_in_text() -> None:
    shell = "```sh\n$ crosscoders cache \\\n  --bass x && diffing scale RUN\nls\n```"
    text = f"`diffing bake RUN`\n\n{shell}\n\n`diffing.latents.table`\n"
    assert [line.split() for line in command_lines(text)] == [
        ["crosscoders", "cache", "--bass", "x"], ["diffing", "scale", "RUN"],
    ]  # fmt: skip
    assert named_commands(text) == ["diffing bake RUN"]
    assert spans("a `b` c\n```text\n`d`\n```\n") == ["b"]
