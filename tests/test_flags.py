"""Every flag that a message names is one of the command that prints it."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from crosscoders import cli as crosscoders_cli
from crosscoders.common.command_line import Command
from diffing import cli as diffing_cli
from sae_lora import cli as sae_lora_cli

ROOT = Path(__file__).parent.parent
PROGRAMS = {"crosscoders": crosscoders_cli, "sae-lora": sae_lora_cli, "diffing": diffing_cli}
EVERYWHERE = {"config", "json", "debug", "help", "preset"}
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)?)")
PROGRAM = "|".join(PROGRAMS)
TWO_WORDS = "|".join(c.name for cli in PROGRAMS.values() for c in cli.COMMANDS if " " in c.name)
NAMED = re.compile(rf"\b({PROGRAM}) ({TWO_WORDS}|[a-z-]+)\b((?:(?!\b(?:{PROGRAM}) )(?:[^.;`]|\.(?=\S)))*)")
"""A command in a sentence, and the rest of the sentence up to the next command."""


def flags_of(command: Command) -> set[str]:
    """Names of the settings of a command, those of nested ones with a dot, as flags are written."""
    names = set(EVERYWHERE)
    for name, hint in typing.get_type_hints(command.settings).items():
        nested = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
        names |= {name, *(f"{name}.{field.name}" for field in nested)}
    return {name.replace("_", "-") for name in names}


COMMANDS = {f"{program} {c.name}": c for program, cli in PROGRAMS.items() for c in cli.COMMANDS}
ANY = {"print-completion"}.union(*map(flags_of, COMMANDS.values()))


def texts_of(path: Path) -> list[str]:
    """Texts of a module, f-strings with X in place of their values; without docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    inside = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in ast.walk(n) if part is not n}
    texts = []
    for node in ast.walk(tree):
        if id(node) in docs | inside:
            continue
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(p.value if isinstance(p, ast.Constant) else "X" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return [text for text in texts if " " in text]


def strangers(text: str, known: set[str]) -> list[str]:
    """Flags in a text that are none of the command before them in the sentence, or, without one, not known."""
    wrong = []
    for program, name, rest in NAMED.findall(text):
        if f"{program} {name}" in COMMANDS:
            of_command = flags_of(COMMANDS[f"{program} {name}"])
            wrong += [flag for flag in FLAG.findall(rest) if flag not in of_command]
    alone = NAMED.sub(lambda m: "" if f"{m[1]} {m[2]}" in COMMANDS else m[0], text)
    return wrong + [flag for flag in FLAG.findall(alone) if flag not in known]


MODULES = sorted(p for package in ("crosscoders", "sae_lora", "diffing") for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_flags_in_messages_exist_in_the_commands_of_the_room(path: Path) -> None:
    room = ".".join(path.parent.relative_to(ROOT).parts)
    here = [command for command in COMMANDS.values() if command.run.startswith(f"{room}.command:")]
    known = set().union(*map(flags_of, here)) if here else ANY
    assert {text: flags for text in texts_of(path) if (flags := strangers(text, known))} == {}


def test_a_flag_of_another_command_is_found() -> None:
    known = flags_of(COMMANDS["diffing lens"])
    assert strangers("Lower --latents, or choose another --out.", known) == ["out"]
    assert strangers("Make it: `diffing scale --cache X --top 3`.", known) == ["top"]
    assert strangers("Run crosscoders cache --crosscoder.k 3, with --top 3", known) == ["crosscoder.k", "top"]
