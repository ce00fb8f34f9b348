"""What `--help` of a command prints: usage with what must be given, one example, and its settings by topic."""

import dataclasses
import re
import textwrap
import typing
from typing import Any, Literal

WIDTH = 80
GENERAL = ("config", "preset", "json", "debug")


EXAMPLES = {
    "base": "google/gemma-2-2b", "tuned": "google/gemma-2-2b-it", "hook_point": "blocks.13.hook_resid_post",
    "data": "chats.jsonl", "run": "runs/mine", "runs": "runs/a runs/b", "cache": "caches/mine", "out": "runs/mine",
    "parts": "caches/1 caches/2", "latent": "939", "prompt": "'Who are you?'", "prompts": "asked.jsonl",
    "audit": "others.jsonl", "repo": "me/crosscoder", "heldout": "heldout.jsonl", "model": "google/gemma-2-2b",
    "sae": "saes/layer13", "dictionary": "saes/layer13",
}  # fmt: skip
"""Values in examples, by setting."""


def help_text(
    title: str, purpose: str, settings: type, actions: list[Any], positional: str | None, more: str = ""
) -> str:
    """Return the help of a command whose settings are the fields of a dataclass.

    title: its program and name. actions: of its parser, with the words about every setting. more: flags of the example
    beside those that must be given.
    """
    about = {action.dest: action for action in actions}
    needed = [f.name for f in dataclasses.fields(settings) if _is_required(f)]
    words = ["RUN" if name == "run" else name.upper() for name in needed if name == positional]
    words += [f"--{name.replace('_', '-')} {name.upper()}" for name in needed if name != positional]
    given = _given(needed, positional) + ([more] if more else [])
    optional = f"[{positional.upper()}] " if positional and positional not in needed else ""
    usage = [f"usage: {title}", *([optional.strip()] if optional else []), *words, "[--SETTING VALUE ...]"]
    parts = [*_lines(usage), "", *textwrap.wrap(purpose, WIDTH), "", *_lines(["example:", title, *given], " \\")]
    for topic, names in _topics(settings, about).items():
        parts += ["", f"{topic}:"]
        for name in names:
            parts += _entry(name, about[name], _hint(settings, name), is_positional=name == positional)
    return "\n".join(parts)


def _given(needed: list[str], positional: str | None) -> list[str]:
    """Return what must be given, with the values of an example."""
    values = {name: EXAMPLES.get(name, name.upper()) for name in needed}
    words = [values.pop(positional)] if positional in values else []
    return words + [f"--{name.replace('_', '-')} {value}" for name, value in values.items()]


def _lines(words: list[str], at_end: str = "") -> list[str]:
    """Return words in lines of the width; `at_end` says that one goes on."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + len(at_end) >= WIDTH:
            lines[-1] += at_end
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _topics(settings: type, about: dict[str, Any]) -> dict[str, list[str]]:
    """Return the settings by topic: what must be given, those of the command, those of each dataclass that it takes
    over or holds, and those of every command."""
    topics: dict[str, list[str]] = {"must be given": []}
    for field in dataclasses.fields(settings):
        nested = [name for name in about if name.startswith(f"{field.name}.") and not name.endswith(".help")]
        owner = next(c for c in reversed(settings.__mro__) if field.name in getattr(c, "__annotations__", {}))
        topic = "must be given" if _is_required(field) else "settings"
        if nested:
            topic = f"settings of {field.name}"
        elif topic == "settings" and owner is not settings:
            topic = f"settings of {_words(owner.__name__.removesuffix('Config').removesuffix('Settings'))}"
        topics.setdefault(topic, []).extend(nested or [field.name])
    topics["of every command"] = [name for name in GENERAL if name in about]
    return {topic: names for topic, names in topics.items() if names}


def _words(name: str) -> str:
    """Return the name of a class as words: PairData is "pair data", TopKLoRA stays as it is written."""
    words = re.sub("(?<=[a-z])(?=[A-Z][a-z])", " ", name).split()
    return " ".join(word.lower() if word.istitle() else word for word in words)


def _hint(settings: type, name: str) -> Any:
    hint: Any = settings
    for part in name.split("."):
        hint = typing.get_type_hints(hint).get(part, str) if dataclasses.is_dataclass(hint) else str
    return hint


def _entry(name: str, action: Any, hint: Any, *, is_positional: bool) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    value = "|".join(map(str, action.choices)) if action.choices else plain(hint)
    value = {"config": "FILE", "json": "", "debug": ""}.get(name, value)
    default = action.default if name not in GENERAL and not action.required else None
    said = " ".join(str(action.help or "").split())
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default)) or None
    if default is not None and default is not False and type(default) in (int, float, str):
        said += f" [{default:,}]" if type(default) is int else f" [{default}]"
    head = f"  {name.upper()}, or {flag} {value}" if is_positional else f"  {flag} {value}".rstrip()
    return [head, *textwrap.wrap(said, WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def plain(hint: Any) -> str:
    """Return a type in words that a command line knows."""
    if typing.get_origin(hint) is Literal:
        return "|".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"{plain(typing.get_args(hint)[0])} ..."
    if dataclasses.is_dataclass(hint):
        return ""
    names = {int: "N", float: "NUMBER", str: "TEXT", bool: "", type(None): ""}
    if hint in names:
        return names[hint]
    kinds = [word for word in map(plain, typing.get_args(hint)) if word]
    longer = [word.removesuffix(" ...") for word in kinds if word.endswith(" ...")]
    return "|".join(word for word in kinds if word not in longer) or "VALUE"
