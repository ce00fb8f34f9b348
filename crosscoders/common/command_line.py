"""The command line of every package: settings from --config FILE (YAML), then flags; one line for every user error.

A command is a settings dataclass and the name of the function that runs it. Settings are parsed before that function's
module is imported, so `--help` and a config error answer without torch.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.completion import completion
from crosscoders.common.errors import CorruptData, EnvironmentFault, InputError, nearest
from crosscoders.common.help import help_text
from crosscoders.common.notices import without_notices
from crosscoders.common.progress import say
from crosscoders.common.words import as_parsed

_LISTED = 20
"""Keys that a message lists."""
TEXTS = ("prompt", "prompts")
"""Settings that may be empty text."""


class Command(NamedTuple):
    """One subcommand."""

    name: str
    """One word, or two: a group and what to do."""
    help: str
    settings: type
    """Frozen dataclass of its settings."""
    run: str
    """`module:function`; the function takes the settings and returns a JSON object, which `--json` prints. An entry
    `text` is for people and printed otherwise."""
    positional: str | None = None
    """Setting that may be given without its flag; a list takes all words before the first flag."""
    presets: dict[str, dict[str, Any]] | None = None
    """Named defaults for --preset."""
    fit_preset: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    """Makes a preset fit the settings beside it; gets the preset and the settings that it would give."""
    takes_url: bool = False
    """Whether `out` may be a URL."""
    example: str = ""
    """Flags of the example in `--help`, beside the settings that must be given."""


class Parsed(NamedTuple):
    """What one command line asks for."""

    settings: Any
    json: bool
    debug: bool


def main(program: str, description: str, commands: list[Command], argv: list[str] | None = None) -> int:
    """Run one command; exit status: 0 done, 2 wrong input, 3 environment, 4 data corrupt, 128 + signal."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # tokens hold any character, a terminal may not
    try:
        _require_text(argv)
        if not argv or argv[0] in ("-h", "--help", "help"):
            lines = [f"  {program} {command.name:<8} {command.help}" for command in commands]
            print(f"usage: {program} COMMAND [--config FILE] [--SETTING VALUE ...]\n\n{description}\n")
            more = f"{program} --print-completion bash prints what completes them in a shell; zsh and tcsh too."
            print(*lines, f"\n{program} COMMAND --help lists the settings of a command.", more, sep="\n", flush=True)
            return 0
        if argv[0] == "--version":
            print(f"{program} {importlib.metadata.version('model-diffing')}")
            return 0
        if argv[0] == "--print-completion":
            print(completion(program, commands, argv[1] if len(argv) > 1 else ""), flush=True)
            return 0
        command = _find(program, commands, argv)
        parsed = parse(program, command, argv[len(command.name.split()) :])
        module, function = command.run.split(":")
        with contextlib.nullcontext() if debug else without_notices():
            result = getattr(importlib.import_module(module), function)(parsed.settings)
        text = result.pop("text", None)
        if parsed.json:
            print(json.dumps(result, indent=1, allow_nan=False))
        elif text:
            print(text)
        sys.stdout.flush()
        return 0
    except (InputError, EnvironmentFault, CorruptData) as error:
        status = error.exit_status
        message = str(error)
    except KeyboardInterrupt as stop:
        status = getattr(stop, "exit_status", 130)
        message = str(stop) or "interrupted. Run the same command to go on."
    except BrokenPipeError:  # of stdout, when the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 0
    except Exception as error:
        if _is_out_of_memory(error):
            status = EnvironmentFault.exit_status
            message = (
                f"out of memory ({(str(error).splitlines() or ['no more is given'])[0]}). Free some, or ask for less "
                "at once; a run that saves states goes on with the same command."
            )
        elif hasattr(error, "exit_status"):
            status, message = int(error.exit_status), str(error)
        else:
            raise
    if debug:
        traceback.print_exc()
    say(f"error: {' '.join(message.split())}")
    return status


def _require_text(argv: list[str]) -> None:
    """Raise InputError for a word that names a file in another encoding than that which all libraries here use."""
    encoding = sys.getfilesystemencoding()
    for word in argv:
        if any("\ud800" <= c <= "\udfff" for c in word) or (encoding != "utf-8" and not word.isascii()):
            raise InputError(
                f"{word!a} is not UTF-8 text, which names of files have to be. Rename it, or set PYTHONUTF8=1."
            )


def _is_out_of_memory(error: Exception) -> bool:
    """Say whether an allocation failed, by the words of those who do not raise MemoryError."""
    words = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _find(program: str, commands: list[Command], argv: list[str]) -> Command:
    for command in commands:
        words = command.name.split()
        if argv[: len(words)] == words:
            return command
    names = [command.name for command in commands]
    of_group = [name for name in names if name.split()[0] == argv[0]]
    if of_group:
        words = [name.split()[1] for name in of_group]
        near = nearest(argv[1], words).removesuffix(".") if len(argv) > 1 else ""
        raise InputError(f"{program} {argv[0]} needs one of {', '.join(words)}{near or '.'}")
    raise InputError(f"unknown command {argv[0]!r}{nearest(argv[0], names)} {program} has {', '.join(names)}.")


def parse(program: str, command: Command, argv: list[str]) -> Parsed:
    """Return settings of a command from its arguments.

    Raises:
        InputError: an unknown key (the nearest one is named), a wrong type, a contradiction.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"{program} {command.name}", description=command.help, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with settings; flags after it win.")
    parser.add_argument("--json", action="store_true", help="Print the results to stdout as one JSON object.")
    parser.add_argument("--debug", action="store_true", help="Show a traceback with an error.")
    if command.presets:
        parser.add_argument("--preset", choices=sorted(command.presets), help="Start from a named recipe.")
    parser.add_class_arguments(command.settings)
    if {"-h", "--help"} & set(argv):
        known = (command.settings, parser._actions, command.positional, command.example)
        print(help_text(parser.prog, command.help, *known), flush=True)
        raise SystemExit(0)
    hints = typing.get_type_hints(command.settings)
    argv = as_parsed(argv, hints, [*_keys(parser), "config"])
    if command.positional and argv and not argv[0].startswith("-"):
        if typing.get_origin(hints[command.positional]) is list:
            words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
            argv = [json.dumps(words), *argv[len(words) :]]
        argv = [f"--{command.positional}", *argv]
    _check_yaml(argv, parser)
    try:
        preset = _preset(argv)
        if preset is not None and command.presets:
            if preset not in command.presets:
                names = sorted(command.presets)
                raise InputError(f"unknown preset {preset!r}{nearest(preset, names)} There are {', '.join(names)}.")
            chosen = command.presets[preset]
            parser.set_defaults(chosen)
            if command.fit_preset:
                parser.set_defaults(command.fit_preset(chosen, parser.parse_args(argv).as_dict()))
        parsed = parser.parse_args(argv)
        instantiated = parser.instantiate(parsed)
        settings = command.settings(
            **{field.name: instantiated[field.name] for field in dataclasses.fields(command.settings)}
        )
    except InputError:
        raise
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise InputError(_one_line(error, parser, command.positional)) from error
    _require_places(command, settings)
    return Parsed(settings, bool(parsed.json), bool(parsed.debug))


def _require_places(command: Command, settings: Any) -> None:
    """Raise InputError for an empty name, which would be the current folder, and for a URL that is none here."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in TEXTS and "" in (value if isinstance(value, list) else [value]):
            raise InputError(f"--{field.name.replace('_', '-')} is empty. Give a value, or leave it out.")
        if field.name == "out" and "://" in str(value) and not command.takes_url:
            raise InputError(f"--out {value!r} is a URL; {command.name} writes to a local folder. Give one.")


def _value_of(argv: list[str], flag: str) -> str | None:
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith(f"{flag}="):
            return arg.split("=", 1)[1]
    return None


def _config_file(argv: list[str]) -> dict[str, Any] | None:
    import yaml

    path = _value_of(argv, "--config")
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"config file {path!r} does not exist. Check the path of --config.")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path!r} is not YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(settings, dict):
        raise InputError(f"config file {path!r} holds no settings; write lines of the form key: value.")
    return settings


def _preset(argv: list[str]) -> str | None:
    return _value_of(argv, "--preset") or (_config_file(argv) or {}).get("preset")


def _keys(parser: Any) -> list[str]:
    return [
        action.dest
        for action in parser._actions
        if action.dest not in ("help", "config") and not action.dest.startswith("print_")
    ]


def _check_yaml(argv: list[str], parser: Any) -> None:
    """Name unknown keys of a config file with the nearest one."""
    keys = _keys(parser)

    def walk(part: dict[str, Any], prefix: str) -> None:
        for key, value in part.items():
            full = f"{prefix}{key}"
            if not any(known == full or known.startswith(f"{full}.") for known in keys):
                raise InputError(_unknown(full, keys))
            if isinstance(value, dict) and any(known.startswith(f"{full}.") for known in keys):
                walk(value, f"{full}.")

    walk(_config_file(argv) or {}, "")


def _unknown(key: str, keys: list[str]) -> str:
    section, _, name = key.rpartition(".")
    beside = [known for known in keys if known.rpartition(".")[0] == section] or keys
    inside = [known for known in keys if known.endswith(f".{name}")]
    where = f" in [{section}]" if section else ""
    if inside and not section:
        return f"unknown key {name!r}; did you mean {inside[0]!r}?"
    names = sorted(known.rpartition(".")[2] for known in beside)
    listed = f"Known keys: {', '.join(names)}." if len(names) <= _LISTED else "--help lists all."
    return f"unknown key {name!r}{where}{nearest(name, names)} {listed}"


def _one_line(error: Exception, parser: Any, positional: str | None) -> str:
    text = " ".join(str(error).split())
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)", text) or re.search(
        r"Option '([^']+)' is not accepted", text
    )
    if unknown:
        return _unknown(unknown[1].rstrip("+"), _keys(parser))
    if "unrecognized arguments: " in text:
        stray = text.split("unrecognized arguments: ")[1]
        beside = "a folder without a flag stands right behind the command" if positional else "every value has its flag"
        return f"{stray!r} is not a setting; {beside}. {parser.prog} --help lists them."
    missing = re.search(r"the following arguments are required: (.*)", text)
    if missing:
        names = (name.strip() for name in missing[1].split(","))
        flags = ", ".join(name if name == positional else f"--{name.replace('_', '-')}" for name in names)
        return f"{flags} must be given. {parser.prog} --help lists the settings."
    wrong = re.search(r'Parser key "([^"]+)": (.*)', text)
    if wrong:
        said = re.sub(r"<class '([^']+)'>", r"\1", wrong[2])
        union = re.search(r"Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", said)
        if union:
            said = f"it takes {union[1].replace(', NoneType', '').replace(', ', ' or ')}, not {union[2]!r}."
        return f"setting {wrong[1]!r} is wrong: {said} {parser.prog} --help lists what it takes."
    return text
