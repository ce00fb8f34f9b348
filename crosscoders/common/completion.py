"""Shell completion: the commands of a program as a tree of argparse parsers, which shtab writes as a script."""

import argparse
import dataclasses
import importlib
import typing
from typing import Any, Literal

from crosscoders.common.errors import EnvironmentFault, InputError

SHELLS = ("bash", "zsh", "tcsh")


def completion(program: str, commands: list[Any], shell: str) -> str:
    """Return the script that completes commands, settings, their choices and files; commands: of the command line.

    Raises:
        InputError: no such shell.
        EnvironmentFault: shtab is not installed.
    """
    if shell not in SHELLS:
        raise InputError(f"no completion for {shell!r}; there is {', '.join(SHELLS)}.")
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError:
        raise EnvironmentFault("shtab is not installed. Run: pip install 'model-diffing[completion]'") from None
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--version", action="store_true")
    top = parser.add_subparsers()
    groups: dict[str, Any] = {}
    for command in commands:
        *group, name = command.name.split()
        for word in group:
            groups.setdefault(word, None)
            groups[word] = groups[word] or top.add_parser(word, help=word).add_subparsers()
        own = (groups[group[0]] if group else top).add_parser(name, help=command.help.replace("%", "%%"))
        _add_settings(own, command, shtab.FILE)
    return str(shtab.complete(parser, shell))


def _add_settings(parser: argparse.ArgumentParser, command: Any, files: Any) -> None:
    """Add the settings of one command; where any text may stand, names of files are offered."""
    hints = typing.get_type_hints(command.settings)
    choices: dict[str, list[str] | None] = {
        field.name: _choices(hints[field.name]) for field in dataclasses.fields(command.settings)
    }
    if command.presets:
        choices["preset"] = sorted(command.presets)
    for name, listed in (choices | {"config": None}).items():
        flag = "--" + name.replace("_", "-")
        added = [parser.add_argument(flag, choices=listed)]
        if name == command.positional:
            added.append(parser.add_argument(name, nargs="*"))
        for argument in added:
            if listed is None:
                argument.complete = files  # type: ignore[attr-defined]
    for name in ("--json", "--debug"):
        parser.add_argument(name, action="store_true")


def _choices(hint: Any) -> list[str] | None:
    if hint is bool:
        return ["true", "false"]
    return [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is Literal else None
