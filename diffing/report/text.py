"""How values become text on the page: visible characters, numbers, highlighted tokens. Nothing here makes markup.

Reading order: `visible` (every string passes it), `numbers`, `fixed`, `counted`, `amount`, `clip`, `flat`,
`highlight`, `html_length`.
"""

import json
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from diffing.report.data import Example

NONE = "–"
WINDOW = 24  # tokens shown on each side of a peak
TOKEN_CHARACTERS = 60  # of one token; the longest ordinary tokens are runs of spaces


class Part(NamedTuple):
    """A stretch of tokens that is shown in one way."""

    text: str
    level: str
    """Opacity of the background, 0.00 to 0.75; empty where the latent is not active."""
    value: str
    is_peak: bool


class _Names(dict[int, str]):
    """Names of characters that do not show, by their codes; filled on demand."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character.isprintable() or character in "\u00a0\u3000":
            shown = character
        else:
            shown = {"\n": "↵", "\t": "⇥"}.get(character, f"[U+{code:04X}]")
        self[code] = shown
        return shown


_NAMES = _Names()


def visible(text: str) -> str:
    """Make each character show: line ends as an arrow, control, bidi and other invisible characters by name.

    A bidi control would reorder the text around it, and a lone surrogate cannot be written as UTF-8.
    """
    return text if text.isprintable() else text.translate(_NAMES)


def numbers(values: Sequence[Any]) -> list[str]:
    """Write numbers to read: three decimals, or three digits where it is small; a dash for None."""
    texts = []
    for value in values:
        if value is None:
            texts.append(NONE)
        elif isinstance(value, int) or abs(value) >= 1000:
            texts.append(f"{value:,.0f}")
        elif value == 0 or abs(value) >= 0.01:
            texts.append(f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}")
        else:
            texts.append(f"{value:.3g}")
    return texts


def number(value: Any) -> str:
    """Write one number to read."""
    return numbers([value])[0]


def fixed(values: Sequence[Any]) -> list[str]:
    """Write ratios, cosines and shares to read: three decimals, so that a column lines up; a dash for None."""
    texts = [NONE if v is None else f"{v:.3f}" if abs(v) < 1000 else f"{v:,.0f}" for v in values]
    return ["0.000" if text == "-0.000" else text for text in texts]


def counted(n: int, noun: str) -> str:
    """Write a count with its noun: 1 latent, 1,203 latents."""
    return f"{number(n)} {noun}" if n == 1 else f"{number(n)} {noun}s"


def amount(count: float) -> str:
    """Write a count to read, short from a million on: 1.64M."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"


def plain(text: str) -> str:
    """Return the letters, digits and simple marks of a text: a figure shows no markup of a file."""
    return "".join(c for c in clip(text, 40) if c.isalnum() or c in " _-./") or "?"


def model_name(name: Any) -> str:
    """Return the name of a model to read: of a local folder only the last part."""
    return Path(str(name)).name if Path(str(name)).is_absolute() else str(name)


def clip(text: str, characters: int = 80) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested plain data to pairs of a dotted name and a short text."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return [(prefix, clip(value if isinstance(value, str) else json.dumps(value), 300))]
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return [(prefix, clip(", ".join(item if isinstance(item, str) else json.dumps(item) for item in value), 300))]
    return [pair for key, item in items for pair in flat(item, f"{prefix}.{key}" if prefix else str(key))]


def highlight(example: Example, top: float) -> list[Part]:
    """Split the tokens around a peak; a background in proportion to the activation, full at `top`.

    Tokens of one character are one part, with the largest of their activations.
    """
    spans = _characters(example.tokens)
    at = next(i for i, span in enumerate(spans) if example.peak in span)
    start, stop = max(0, at - WINDOW), min(len(spans), at + WINDOW + 1)
    parts = [Part("…", "", "", False)] if start else []
    plain = ""
    for i, span in enumerate(spans[start:stop], start):
        text, value = "".join(example.tokens[k] for k in span), max(example.values[k] for k in span)
        if len(text) > TOKEN_CHARACTERS:
            text = clip(text, TOKEN_CHARACTERS)
        if value <= 0 and i != at:
            plain += text
            continue
        if plain:
            parts.append(Part(plain, "", "", False))
            plain = ""
        level = max(0.05, 0.75 * min(1.0, value / top)) if top > 0 else 0.05
        parts.append(Part(text, f"{level:.2f}", number(value), i == at))
    plain += "…" if stop < len(spans) else ""
    return [*parts, Part(plain, "", "", False)] if plain else parts


def _characters(tokens: list[str]) -> list[range]:
    """Return stretches of tokens that can be shown apart: an empty token is part of the character before it."""
    starts = [i for i, token in enumerate(tokens) if token]
    return [range(a, b) for a, b in pairwise([0, *starts[1:], len(tokens)])]


def html_length(text: str) -> int:
    """Count the characters of a text once it is escaped."""
    return len(escape(visible(text)))
