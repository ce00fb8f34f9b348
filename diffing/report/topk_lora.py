"""The section of a TopKLoRA: how faithful it is, its directions with contexts, curves and sets of behaviours.

Reading order: `topk_section`, then one function per table.
"""

import re
from pathlib import Path
from typing import Any

import pandas

from crosscoders.common.files import read_model
from crosscoders.common.results import ResultRecord
from diffing.report.figures import Figure, spec
from diffing.report.sections import Section, SetsRecord, Table, TopKRun, pair_of, with_interval
from diffing.report.text import NONE, clip, number, plain

SHOWN_DIRECTIONS = 40
COLOURS = ("#d55e00", "#2f86c9", "#009e73", "#cc79a7", "#e69f00", "#8a8a8a")
_CURVE = re.compile(r"topk-lora\.(.+)\.(necessity|sufficiency)\.(\d+)")


def topk_section(folder: Path, place: int) -> Section:
    """Return the section of a run folder of `diffing topk-lora fit`.

    Raises:
        CorruptData: a file is damaged.
    """
    config = read_model(folder / "topk-run.json", TopKRun)["config"]
    rows = {entry["name"]: entry for entry in read_model(folder / "eval.json", ResultRecord)["rows"]}
    sets = read_model(folder / "sets.json", SetsRecord) if (folder / "sets.json").is_file() else None
    tables = [_inside(rows), _directions(folder)]
    figures: list[Figure] = []
    sentences = [_faithfulness(rows)]
    if sets is not None:
        tables.insert(0, _sets(sets))
        figures = _curves(sets["rows"], place)
    else:
        sentences.append(f"No sets were looked for. Run: diffing topk-lora sets {folder} --prompts CHATS --audit CHATS")
    k = "all" if config.get("k") is None else config["k"]
    title = f"TopKLoRA: {k} of {config['rank']} directions a token and module ({config['gate']})"
    result_rows = [*rows.values(), *([] if sets is None else sets["rows"])]
    return Section(f"topk-lora-{place}", title, sentences, tables, figures, pair_of(config), result_rows)


def _faithfulness(rows: dict[str, Any]) -> str:
    kl, base, dead, closed = (rows[f"topk-lora.{name}"] for name in ("kl", "kl_base", "dead", "share_closed"))
    return (
        f"Held-out KL(tuned || base with the adapter) is {with_interval(kl)} nats a token, of the base alone "
        f"{with_interval(base)} (95%, n = {number(kl['n'])} tokens): {closed['value']:.1%} closed. "
        f"{dead['value']:.1%} of {number(dead['n'])} directions never fire."
    )


def _inside(rows: dict[str, Any]) -> Table:
    layers = sorted(int(name.rsplit("_", 1)[1]) for name in rows if name.startswith("topk-lora.nmse.layer_"))
    cells = [
        [str(layer), *(f"{rows[f'topk-lora.{key}.layer_{layer}']['value']:.3f}" for key in ("nmse", "nmse_of_change"))]
        for layer in layers
    ]
    note = "Below 1 in the last column the adapted base is nearer to the tuned model inside than the base was."
    return Table("Residual stream after each layer", ["layer", "error / variance", "error / change"], cells, note)


def _directions(folder: Path) -> Table:
    table = pandas.read_parquet(folder / "directions.parquet")
    cells = [
        [
            f"{entry['site']} {entry['direction']}", f"{entry['write_share']:.1%}", f"{entry['firing_rate']:.2%}",
            f"{clip(str(entry['main_label']), 40)} ({entry['main_label_share']:.0%})", clip(str(entry["context"])),
            ", ".join(map(repr, entry["lens"])) or NONE,
        ]
        for entry in table.head(SHOWN_DIRECTIONS).to_dict("records")
    ]  # fmt: skip
    return Table(
        f"The {len(cells)} of {number(len(table))} directions that write most",
        ["direction", "share written", "fires on", "mostly in", "strongest (>>token<<)", "writes for"],
        cells,
    )


def _sets(record: dict[str, Any]) -> Table:
    rows = {entry["name"]: entry for entry in record["rows"]}
    cells = []
    for label, directions in record["sets"].items():
        if directions is None:
            cells.append([label, "none was found", NONE, NONE, NONE])
            continue
        left, kept = rows[f"topk-lora.{label}.left_after_ablation"], rows[f"topk-lora.{label}.others_kept"]
        random = [rows.get(f"topk-lora.{label}.random.{key}") for key in ("left", "others_kept")]
        chance = ", ".join(NONE if entry is None else f"{entry['value']:.2f}" for entry in random)
        cells.append([
            label, str(len(directions)), f"{left['value']:.2f} (up to {left['high']:.2f}) of {left['n']}",
            f"{kept['value']:.2f} {kept['unit'].removeprefix('smallest share of prompts ')}", chance,
        ])  # fmt: skip
    note = "Found on the prompts of the search, counted on others. Random sets write as much."
    header = ["behaviour", "directions", "left when ablated", "others kept, worst", "random sets: left, kept"]
    return Table("Smallest sets behind each behaviour", header, cells, note)


def _curves(rows: list[dict[str, Any]], place: int) -> list[Figure]:
    points: dict[str, dict[str, list[tuple[int, float, float]]]] = {"necessity": {}, "sufficiency": {}}
    counts = set()
    for entry in rows:
        if match := _CURVE.fullmatch(entry["name"]):
            points[match[2]].setdefault(match[1], []).append((int(match[3]), entry["value"], entry["random"]))
            counts.add(entry["n"])
    titles = {"necessity": "left when the first n are ablated", "sufficiency": "given when only the first n are on"}
    n = " to ".join(number(count) for count in sorted({min(counts), max(counts)})) if counts else "0"
    return [
        Figure(
            f"topk-{curve}-{place}",
            f"Share of a behaviour {titles[curve]}",
            f"Dotted: random directions that write as much. n = {n} held-out prompts of a behaviour.",
            spec(
                [trace for i, entry in enumerate(sorted(labels.items())) for trace in _lines(*entry, COLOURS[i % 6])],
                xaxis={"title": {"text": "directions"}, "type": "log"},
                yaxis={"title": {"text": "share of prompts"}, "range": [-0.03, 1.03]},
            ),
        )
        for curve, labels in points.items()
        if labels
    ]


def _lines(label: str, points: list[tuple[int, float, float]], colour: str) -> list[dict[str, Any]]:
    sizes, own, random = (list(values) for values in zip(*sorted(points), strict=True))
    shared = {"type": "scatter", "mode": "lines+markers", "x": sizes}
    return [
        {**shared, "name": plain(label), "y": own, "line": {"color": colour}},
        {**shared, "y": random, "line": {"color": colour, "dash": "dot"}, "showlegend": False, "hoverinfo": "skip"},
    ]
