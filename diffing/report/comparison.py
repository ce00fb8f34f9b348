"""The section of `diffing compare`: three blocks of methods, each beside random and a null.

Reading order: `compare_section`, then one function per block.
"""

from pathlib import Path
from typing import Any

from crosscoders.common.files import read_model
from crosscoders.common.results import ResultRecord
from diffing.report.figures import Figure, spec
from diffing.report.sections import Section, Table, pair_of, with_interval
from diffing.report.text import NONE, clip, model_name, number, plain
from diffing.report.topk_lora import COLOURS

SHOWN_TEXTS = 6
Values = dict[str, dict[str, Any]]
"""Rows by name, without `compare.`."""


class CompareRecord(ResultRecord):
    """compare.json of `diffing compare`."""

    version = 1
    again = "run diffing compare again"
    format_version: int
    config: dict[str, Any]
    hook_point: str
    behaviours: list[str]
    n_seeds: int
    texts: dict[str, dict[str, dict[str, list[str]]]]


def compare_section(folder: Path, place: int) -> Section:
    """Return the section of a folder with compare.json.

    Raises:
        CorruptData: the file is damaged.
    """
    record = read_model(folder / "compare.json", CompareRecord)
    values = {entry["name"].removeprefix("compare."): entry for entry in record["rows"]}
    sizes = _sizes(values)
    tables = [
        _directions(values, sizes, record["behaviours"]),
        _scores(values, bool(record["behaviours"])),
        *_texts(values, record["texts"]["tuned"], bool(record["behaviours"])),
    ]
    return Section(
        f"compare-{place}", "Every method, side by side", _sentences(record, values),
        [table for table in tables if table.rows], _curves(values, sizes, place), pair_of(record["config"]),
        record["rows"],
    )  # fmt: skip


def _sentences(record: dict[str, Any], values: Values) -> list[str]:
    null, seeds = record["config"].get("null"), record["n_seeds"]
    beside = f"null {model_name(null)}" if null else "no null, so that what any fine-tune would give is not known"
    sentences = [f"At {record['hook_point']}, {seeds} {'seed' if seeds == 1 else 'seeds'}, {beside}."]
    if not record["behaviours"]:
        return [*sentences, "No file of planted behaviours was named, so there are no rates, AUROC or hits."]
    found = [name.split(".")[2] for name, entry in values.items() if name.endswith(".found") and entry["value"]]
    shown = {
        name: [_cell(values, f"tuned.behaviour.{which}.{name}", ".0%") for which in ("base", "tuned")]
        for name in record["behaviours"]
    }
    rates = ", ".join(f"{plain(name)} {base} and {tuned}" for name, (base, tuned) in shown.items())
    beyond = ", ".join(found) or "no method"
    return [*sentences, f"Shown by base and tuned: {rates}. Found beyond the null and random by: {beyond}."]


def _sizes(values: Values) -> dict[str, list[int]]:
    """Return the numbers of pieces of each method of directions."""
    sizes: dict[str, list[int]] = {}
    for name in values:
        which, block, method, *rest = name.split(".")
        if (which, block) == ("tuned", "directions") and rest[-1] == "share_closed" and rest[0].startswith("top_"):
            sizes.setdefault(method, []).append(int(rest[0].removeprefix("top_")))
    return sizes


def _cell(values: Values, name: str, form: str) -> str:
    return format(values[name]["value"], form) if name in values else NONE


def _found(values: Values, start: str) -> str:
    entry = values.get(f"tuned.{start}.found")
    return NONE if entry is None else "found" if entry["value"] else "not found"


def _directions(values: Values, sizes: dict[str, list[int]], behaviours: list[str]) -> Table:
    cells = []
    for method, of_method in sizes.items():
        start, last = f"directions.{method}", f"top_{max(of_method)}"
        rates = [_cell(values, f"tuned.{start}.{last}.{name}", ".0%") for name in behaviours]
        cells.append([
            method, number(max(of_method)), _cell(values, f"tuned.{start}.{last}.numbers", ".3g"),
            with_interval(values[f"tuned.{start}.{last}.share_closed"], ".1%"),
            _cell(values, f"tuned.{start}.random.{last}.share_closed", ".1%"),
            _cell(values, f"null.{start}.{last}.share_closed", ".1%"), *rates,
            *([_found(values, start)] if behaviours else []),
        ])  # fmt: skip
    header = ["method", "pieces", "numbers a token", "share of KL closed", "random pieces", "null pair", *behaviours]
    header += ["behaviour"] if behaviours else []
    note = "The behaviours' columns are shares of greedy replies." if behaviours else ""
    return Table("Directions: what the first pieces bring into the base", header, cells, note)


def _scores(values: Values, is_told: bool) -> Table:
    cells = []
    for method in _methods(values, "scores"):
        start = f"scores.{method}"
        told = [
            with_interval(values[f"tuned.{start}.auroc"], ".3f") if f"tuned.{start}.auroc" in values else NONE,
            _cell(values, f"tuned.{start}.random.auroc", ".3f"), _cell(values, f"null.{start}.auroc", ".3f"),
            _found(values, start),
        ]  # fmt: skip
        above, labels = _cell(values, f"tuned.{start}.above", ".2%"), _cell(values, f"tuned.{start}.labels", ".0%")
        cells.append([method, above, labels, *(told if is_told else [])])
    header = ["method", "tokens above the null's 99.9%", "explained by labels"]
    header += ["AUROC", "permuted", "null pair", "behaviour"] if is_told else []
    note = "AUROC: the chance that a planted token scores higher than another." if is_told else ""
    return Table("Scores per token", header, cells, note)


def _texts(values: Values, texts: dict[str, dict[str, list[str]]], is_told: bool) -> list[Table]:
    cells = [
        [method, *(_cell(values, f"{which}texts.{method}.{word}hits", ".1f") for which, word in
                   (("tuned.", ""), ("tuned.", "random."), ("null.", ""))), _found(values, f"texts.{method}")]
        for method in _methods(values, "texts")
    ]  # fmt: skip
    header = ["method", "hits", "random", "null pair", "behaviour"]
    counted = Table("Texts: hits among the first 20 tokens, or samples with a planted phrase", header, cells)
    first = [
        [method if i == 0 else "", clip(text, 120)]
        for method, listed in texts.items()
        for i, text in enumerate(list(dict.fromkeys(listed["own"]))[:SHOWN_TEXTS])
    ]
    return [*([counted] if is_told else []), Table("First different texts of each method", ["method", "texts"], first)]


def _methods(values: Values, block: str) -> list[str]:
    start, end = f"tuned.{block}.", ".seconds"
    return [name[len(start) : -len(end)] for name in values if name.startswith(start) and name.endswith(end)]


def _curves(values: Values, sizes: dict[str, list[int]], place: int) -> list[Figure]:
    traces, ticks = [], sorted({n for of_method in sizes.values() for n in of_method})
    for i, (method, of_method) in enumerate(sizes.items()):
        colour = COLOURS[i % len(COLOURS)]
        for word, line in (("", {"color": colour}), ("random.", {"color": colour, "dash": "dot"})):
            names = [(n, f"tuned.directions.{method}.{word}top_{n}.share_closed") for n in sorted(of_method)]
            points = [(n, values[name]["value"]) for n, name in names if name in values]
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": method, "x": [n for n, _ in points],
                "y": [value for _, value in points], "line": line, "showlegend": not word,
            })  # fmt: skip
    if not traces:
        return []
    return [
        Figure(
            f"compare-{place}-closed",
            "Share of KL(tuned, base) that the first n pieces close",
            "Dotted: random pieces. A piece of weight-svd is one rank of every matrix.",
            spec(
                traces,
                xaxis={"title": {"text": "pieces"}, "type": "log", "tickvals": ticks},
                yaxis={"title": {"text": "share of KL closed"}, "tickformat": ".0%"},
            ),
        )
    ]
