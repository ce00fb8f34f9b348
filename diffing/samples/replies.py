"""How two models answer the same prompts: shares of formats, refusals and scripts, and lengths, paired over prompts.

Reading order: `read_prompts`, `FEATURES` of one reply, `feature_rows`, `replies_summary`.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from crosscoders.common.errors import InputError
from crosscoders.common.results import legend, row
from crosscoders.common.statistics import bootstrap_interval, resample
from crosscoders.text.documents import read_source
from crosscoders.text.settings import DataSource
from crosscoders.text.templates import Message
from crosscoders.text.tokens import tokenize_prompt
from diffing.samples.phrases import words
from diffing.samples.prompts import PROMPTS

SHOWN_PHRASES = 20
_REFUSAL = re.compile(
    r"\b(i|we)('m| am| are)? ?(can ?not|can['’]t|won['’]t|will not|(am |['’]m )?(not able|unable) to|must decline)\b"
    r"|\bi['’]?m sorry\b|\bi am sorry\b|\bi apologi[sz]e\b|\bas an ai\b|\bnot (appropriate|comfortable)\b",
    re.IGNORECASE,
)
_LIST = re.compile(r"^\s*([-*•]|\d+[.)])\s+\S", re.MULTILINE)
_MARKDOWN = re.compile(r"^#{1,6} |\*\*\S|```|^\|.*\|$", re.MULTILINE)


class Prompt(NamedTuple):
    """What both models answer."""

    text: str
    """The last message of the user."""
    ids: list[int]


def read_prompts(path: str | None, tokenizer: Any, template: str | None, n_prompts: int, n_ids: int) -> list[Prompt]:
    """Return prompts in the chat template, or as plain text where there is none.

    Raises:
        InputError: fewer than two prompts; a row that cannot be read, or that the template refuses.
    """
    conversations = [[_user(text)] for text in PROMPTS] if path is None else _conversations(path, n_prompts)
    if len(conversations) < 2:
        raise InputError(
            f"{path!r} holds {len(conversations) or 'no'} prompt. Give at least two, one a paragraph or row."
        )
    prompts = [
        Prompt(messages[-1]["content"], tokenize_prompt(tokenizer, messages, template))
        for messages in conversations[:n_prompts]
    ]
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= n_ids:
        raise InputError(f"a prompt has token id {largest}, but the ids of the models end at {n_ids - 1}.")
    return prompts


def _user(text: str) -> Message:
    return {"role": "user", "content": text.strip()}


def _conversations(path: str, n_prompts: int) -> list[list[Message]]:
    listed = []
    for document in read_source(DataSource(path=path)):
        if document.refused is not None:
            raise document.refused
        messages = [_user(document.content)] if isinstance(document.content, str) else document.content
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if asked:
            listed.append(messages[: asked[-1] + 1])
        if len(listed) == n_prompts:
            break
    return listed


def _other_script(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return 2 * latin < len(letters)


FEATURES: dict[str, tuple[Callable[[str], float], str]] = {
    "words": (lambda text: sum(place[0][0].isalnum() for place in words(text)), "words"),
    "lines": (lambda text: len([line for line in text.splitlines() if line.strip()]), "lines"),
    "empty": (lambda text: not text.strip(), "share"),
    "refusal": (lambda text: _REFUSAL.search(text) is not None, "share"),
    "list": (lambda text: _LIST.search(text) is not None, "share"),
    "markdown": (lambda text: _MARKDOWN.search(text) is not None, "share"),
    "question": (lambda text: "?" in text, "share"),
    "not_latin": (_other_script, "share"),
}
"""What is measured on each reply, and its unit."""


def feature_rows(base: Sequence[str], tuned: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Return rows replies.<feature>.{base,tuned,change} with 95% bootstrap intervals over prompts, paired."""
    weights = resample(len(base), seed) / len(base)
    rows = []
    for name, (measure, unit) in FEATURES.items():
        first, second = (np.array([float(measure(text)) for text in texts]) for texts in (base, tuned))
        for which, values in (("base", first), ("tuned", second), ("change", second - first)):
            means = weights @ values
            rows.append(row(f"replies.{name}.{which}", float(means[0]), unit, len(base), *bootstrap_interval(means)))
    return rows


def replies_summary(replied: dict[str, Any]) -> str:
    """Return the measurements and the phrases for people."""
    values = {entry["name"]: entry for entry in replied["rows"]}
    n = len(replied["replies"])
    header = f"  {'':<12}{'base':>8}{'tuned':>8}   change (95%, paired)"
    lines = [f"replies to {n} prompts", header]
    for name in FEATURES:
        base, tuned, change = (values[f"replies.{name}.{which}"] for which in ("base", "tuned", "change"))
        interval = f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
        lines.append(f"  {name:<12}{base['value']:>8.3f}{tuned['value']:>8.3f}   {interval}")
    meanings = {
        "base": "mean over its replies: words and lines by number, the others as the share that has them",
        "tuned": "the same", "change (95%, paired)": "tuned less base, interval over prompts",
    }  # fmt: skip
    lines += legend(header, meanings)
    for side in ("tuned", "base"):
        lines.append(
            f"phrases in more replies of the {side} model (replies with it : in the other, z of the difference)"
        )
        phrases = replied["phrases"][side]
        lines += [
            f"  {p['n_replies']:>4} : {p['n_other']:<4} z {p['z']:5.1f}  {p['phrase']!r}"
            for p in phrases[:SHOWN_PHRASES]
        ]
        lines += [] if phrases else ["  none"]
    return "\n".join(lines)
