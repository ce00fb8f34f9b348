"""Arguments as people type them -> as the parser reads them."""

import itertools
import json
import re
import typing
from typing import Any, Literal

_THOUSANDS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}


def as_parsed(argv: list[str], hints: dict[str, Any], keys: list[str]) -> list[str]:
    """Return the arguments with whole flags and values in the parser's form.

    hints: the type of each setting; keys: every flag that the command takes.
    """
    argv = with_whole_flags(with_underscores(argv), keys)
    argv = with_true(argv, [name for name, hint in hints.items() if hint is bool])
    return with_numbers(with_lists(argv, hints), hints)


def with_underscores(argv: list[str]) -> list[str]:
    """Return the arguments with underscores in flags, which may be written with dashes: --n-tokens is --n_tokens."""
    return [
        re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg) if arg.startswith("--") else arg
        for arg in argv
    ]


def with_true(argv: list[str], switches: list[str]) -> list[str]:
    """Return the arguments with `--force` alone written as `--force=true`."""
    return [
        f"{word}=true" if word[2:] in switches and word.startswith("--") and after.startswith("--") else word
        for word, after in zip(argv, [*argv[1:], "--"], strict=False)
    ]


def with_lists(argv: list[str], hints: dict[str, Any]) -> list[str]:
    """Return the arguments with lists in the form [a, b], also where they are typed as `6 939` or `6,939`.

    Words without spaces and slashes are parted at commas. One word stays as it is where one value will do.
    """
    words: list[str] = []
    while argv:
        flag, _, value = argv[0].partition("=")
        hint = hints.get(flag[2:])
        kinds = (hint,) if typing.get_origin(hint) is list else typing.get_args(hint) or (hint,)
        lists = [kind for kind in kinds if typing.get_origin(kind) is list]
        values = [value] if value else list(itertools.takewhile(lambda word: not re.match("-[^0-9.]", word), argv[1:]))
        if not flag.startswith("--") or not lists or not values or values[0].startswith("["):
            words, argv = [*words, argv[0]], argv[1:]
            continue
        argv = argv[1 if value else 1 + len(values) :]
        entries = [part for word in values for part in (word.split(",") if re.fullmatch(r"[^\s/]+", word) else [word])]
        entries = [entry for entry in entries if entry]
        is_text = typing.get_args(lists[0]) == (str,)
        is_one = len(entries) == 1 and any(
            entries[0] in typing.get_args(kind) if typing.get_origin(kind) is Literal else kind in (str, int, float)
            for kind in kinds
        )
        whole = json.dumps(entries) if is_text else f"[{', '.join(entries)}]"
        words += [flag, entries[0] if is_one else whole]
    return words


def with_whole_flags(argv: list[str], keys: list[str]) -> list[str]:
    """Return the arguments with whole names of flags that are abbreviated: --latent is --latents where no other flag
    begins so."""
    words = []
    for word in argv:
        flag, is_given, value = word.partition("=")
        longer = [key for key in keys if key.startswith(flag[2:])]
        if flag.startswith("--") and len(flag) > 2 and flag[2:] not in keys and len(longer) == 1:
            word = f"--{longer[0]}{is_given}{value}"
        words.append(word)
    return words


def with_numbers(argv: list[str], hints: dict[str, Any]) -> list[str]:
    """Return the arguments with digits in place of whole numbers written as 10k, 1.5M, 1e6 or 10,000."""
    words = list(argv)
    for i, flag in enumerate(argv):
        name, is_given, value = flag.partition("=")
        if int not in (hints.get(name[2:]), *typing.get_args(hints.get(name[2:]))):
            continue
        value = value if is_given else "".join(argv[i + 1 : i + 2])
        match = re.fullmatch(r"(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?(?:e\d+)?)([kKMB]?)", value)
        number = float(match[1].replace(",", "")) * _THOUSANDS[match[2]] if match and not value.isdecimal() else 0.5
        if number.is_integer():
            words[i : i + 2] = [f"{name}={int(number)}"] if is_given else [flag, str(int(number))]
    return words
