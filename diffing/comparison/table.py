"""The table of `diffing compare` for people: three blocks, each method beside the null and random."""

from typing import Any

SHOWN_TEXTS = 8
_WIDTH = 22


def compare_table(described: dict[str, Any]) -> str:
    """Return the three blocks, what was found, and the first texts."""
    values = {entry["name"].removeprefix("compare."): entry for entry in described["rows"]}
    n_seeds, behaviours = described["n_seeds"], described["behaviours"]
    config = described["config"]
    lines = [
        f"base {config['base']}, tuned {config['tuned']}, null {config['null']}; {described['hook_point']}; "
        f"{n_seeds} {'seed' if n_seeds == 1 else 'seeds'}"
    ]
    lines += _own_rates(values, behaviours)
    for block, title in (
        (
            "directions",
            "directions: first n pieces [numbers a token], share of KL closed (random pieces; the null pair's own), "
            "and in how many replies each planted behaviour shows (random)",
        ),
        ("scores", "scores per token: AUROC of planted tokens (random; the null pair's own)"),
        ("texts", "texts: hits among the first 20 tokens, or samples with a planted phrase"),
    ):
        methods = dict.fromkeys(
            name.split(".")[2] for name in values if name.startswith(f"tuned.{block}.") and name.endswith(".seconds")
        )
        if methods:
            lines += ["", title]
        for method in methods:
            start = f"{block}.{method}"
            entries = {"directions": _pieces, "scores": _scores, "texts": _hits}[block](values, start, behaviours)
            lines += [f"  {method:<{_WIDTH}}{entries[0]}{_closing(values, start)}", *(f"    {e}" for e in entries[1:])]
    words = "found, beyond random: by the rules of docs/math.md, over all seeds; s: seconds on this machine"
    return "\n".join([*lines, "", words, *_first_texts(described)])


def _own_rates(values: dict[str, Any], behaviours: list[str]) -> list[str]:
    rates = (
        f"{name} {values[f'tuned.behaviour.base.{name}']['value']:.0%} and "
        f"{values[f'tuned.behaviour.tuned.{name}']['value']:.0%}"
        for name in behaviours
    )
    return [f"planted behaviours, base and tuned: {', '.join(rates)}"] if behaviours else []


def _value(values: dict[str, Any], name: str, form: str) -> str:
    return format(values[name]["value"], form) if name in values else "-"


def _pieces(values: dict[str, Any], start: str, behaviours: list[str]) -> list[str]:
    prefix = f"tuned.{start}.top_"
    sizes = [name[len(prefix) :].split(".")[0] for name in values if name.startswith(prefix)]
    lines = [""]
    for size in dict.fromkeys(sizes):
        own, random, null = (
            _value(values, f"{which}.top_{size}.share_closed", "+.1%")
            for which in (f"tuned.{start}", f"tuned.{start}.random", f"null.{start}")
        )
        rates = [
            f"{name} {_value(values, f'tuned.{start}.top_{size}.{name}', '.0%')} "
            f"({_value(values, f'tuned.{start}.random.top_{size}.{name}', '.0%')})"
            for name in behaviours
        ]
        numbers = _value(values, f"tuned.{start}.top_{size}.numbers", ".3g")
        lines.append(f"n {size:>4} {f'[{numbers}]':>8}  {own:>7} ({random}; {null})  {', '.join(rates)}".rstrip())
    if f"tuned.{start}.every.share_closed" in values:
        own, null = (_value(values, f"{which}.{start}.every.share_closed", "+.1%") for which in ("tuned", "null"))
        rates = [f"{name} {_value(values, f'tuned.{start}.every.{name}', '.0%')}" for name in behaviours]
        lines.append(f"every piece    {own:>7} (-; {null})  {', '.join(rates)}".rstrip())
    return lines


def _scores(values: dict[str, Any], start: str, behaviours: list[str]) -> list[str]:
    own, random, null = (
        _value(values, f"{which}.auroc", ".3f")
        for which in (f"tuned.{start}", f"tuned.{start}.random", f"null.{start}")
    )
    told = f"AUROC {own} ({random}; {null})  " if behaviours else ""
    above = f"above the null's 99.9% {_value(values, f'tuned.{start}.above', '.2%')} of tokens"
    if behaviours:
        above += f", {_value(values, f'tuned.{start}.planted_above', '.1%')} of planted ones"
    labels = f"labels explain {_value(values, f'tuned.{start}.labels', '.0%')}"
    return [f"{told}{above}; {labels} ({_value(values, f'tuned.{start}.random.labels', '.0%')})"]


def _hits(values: dict[str, Any], start: str, behaviours: list[str]) -> list[str]:
    if not behaviours:
        return [""]
    own, random, null = (
        _value(values, f"{which}.hits", ".1f") for which in (f"tuned.{start}", f"tuned.{start}.random", f"null.{start}")
    )
    return [f"hits {own} ({random}; {null})"]


def _closing(values: dict[str, Any], start: str) -> str:
    """Return what a method found, and what it cost."""
    words = []
    if f"tuned.{start}.found" in values:
        words.append("FOUND" if values[f"tuned.{start}.found"]["value"] else "not found")
    if f"tuned.{start}.beyond" in values:
        words.append("beyond random" if values[f"tuned.{start}.beyond"]["value"] else "as random")
    return f"  {', '.join(words)}  {values[f'tuned.{start}.seconds']['value']:.0f} s".rstrip()


def _first_texts(described: dict[str, Any]) -> list[str]:
    lines = []
    for method, texts in described["texts"]["tuned"].items():
        lines += [
            "",
            f"{method}: {' | '.join(text.strip().replace(chr(10), '↵') for text in texts['own'][:SHOWN_TEXTS])}",
        ]
    return lines
