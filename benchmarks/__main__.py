"""`python -m benchmarks list`, `run NAME [--quick] [--json] [--out FOLDER]`, `report [--out FOLDER]`.

A benchmark is a module with a docstring and `run(quick: bool) -> dict`, whose rows follow docs/formats.md. throughput
also takes `--only PART ...`, `--peers` and `--checkout NAME=FOLDER ...`; chat-pair takes `--runs VARIANT=RUN ...` with
`--cache HELDOUT`. methods, planted and real take `--only` too. chat-pair, faults, methods, planted, real, sae-lora and
topk-lora keep what they train in OUT/NAME.
"""

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, EnvironmentFault, InputError, nearest
from crosscoders.common.notices import without_notices
from crosscoders.common.results import ResultRecord

BENCHMARKS = {
    "chat-pair": "benchmarks.chat_pair",
    "decompose": "benchmarks.decompose",
    "demo-pair": "benchmarks.embedded_pair",
    "faults": "benchmarks.faults",
    "methods": "benchmarks.methods",
    "planted": "benchmarks.planted",
    "real": "benchmarks.real",
    "sae-lora": "benchmarks.sae_lora_gap",
    "throughput": "benchmarks.throughput",
    "topk-lora": "benchmarks.topk_lora",
}
OPTIONS = {
    "throughput": ("only", "peers", "checkout"), "chat-pair": ("runs", "cache"), "methods": ("only",),
    "planted": ("only",), "real": ("only", "model"),
}  # fmt: skip
"""Flags that only some benchmarks take."""
COLUMNS = (
    "value: an estimate, or a median over rounds or seeds; interval: 95%, for throughput the quartiles of the rounds; "
    "unit: of both; n: how many things the value is over (docs/formats.md, docs/performance.md)"
)
"""What the columns of the table are."""
KEEPING = ("chat-pair", "decompose", "faults", "methods", "planted", "real", "sae-lora", "topk-lora")
"""Benchmarks that keep what they train."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the benchmarks")
    run = commands.add_parser("run", help="run one and keep its rows")
    run.add_argument("name")
    run.add_argument("--quick", action="store_true", help="a small version, for trying it out")
    run.add_argument("--json", action="store_true", help="print the result as one JSON object")
    run.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="PART",
        help="throughput: some parts, such as steps cache; real: some stages; planted: some sizes, such as unkind; "
        "methods: some pairs, or delta",
    )
    run.add_argument("--peers", action="store_true", help="throughput: also against other toolkits that are installed")
    run.add_argument(
        "--checkout",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="throughput: also against these repositories",
    )
    run.add_argument(
        "--runs",
        nargs="+",
        action="extend",
        default=[],
        metavar="VARIANT=RUN",
        help="chat-pair: your own scaled runs, l1=RUN or batchtopk=RUN, several of one variant as its seeds",
    )
    run.add_argument("--cache", metavar="HELDOUT", help="chat-pair: with --runs, the cache whose chats are measured on")
    run.add_argument("--model", metavar="FOLDER", help="real: another base model than Gemma 3 270M from its package")
    report = commands.add_parser("report", help="print the kept rows as Markdown tables")
    for command in (run, report):
        command.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            for name, module in BENCHMARKS.items():
                print(f"{name:<16} {(importlib.import_module(module).__doc__ or '').splitlines()[0]}")
        elif args.command == "run":
            listed = {name: getattr(args, name) for names in OPTIONS.values() for name in names}
            options = {name: tuple(v) if isinstance(v, list) else v for name, v in listed.items() if v}
            with without_notices():
                result = run_one(args.name, quick=args.quick, out=args.out, options=options)
            print(json.dumps(result, indent=1) if args.json else markdown(result))
        else:
            for path in sorted(args.out.glob("*.json")):
                print(markdown(files.read_model(path, ResultRecord)))
    except (InputError, EnvironmentFault, CorruptData) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def run_one(name: str, *, quick: bool, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run a benchmark and keep its result as OUT/NAME.json; a part of one, and a quick run, say so in the name.

    Raises:
        InputError: there is no such benchmark, or it has no such option.
    """
    import torch

    from crosscoders.common.provenance import environment

    if name not in BENCHMARKS:
        raise InputError(
            f"unknown benchmark {name!r}{nearest(name, list(BENCHMARKS))} There are {', '.join(BENCHMARKS)}."
        )
    for option in options:
        if option not in OPTIONS.get(name, ()):
            owners = " and ".join(other for other, names in OPTIONS.items() if option in names)
            raise InputError(f"{name} takes no --{option}; only {owners} does. Leave it out.")
    work = {"work": out / name} if name in KEEPING else {}
    result = {
        "config": {"quick": quick, **options},
        "environment": environment("cuda" if torch.cuda.is_available() else None),
        "date": datetime.date.today().isoformat(),
        **importlib.import_module(BENCHMARKS[name]).run(quick, **work, **options),
    }
    parts = ("own",) if options.get("runs") else options.get("only", ())  # beside the results of the embedded pair
    words = [name, *parts, *(("quick",) if quick else ())]
    files.write_json(out / f"{'-'.join(words)}.json", result)
    return result


def markdown(result: dict[str, Any]) -> str:
    """Return machine and date, the rows as one Markdown table, what the rows are noted for, and what was left out.

    A benchmark of thousands of rows gives tables of its own, `text`, in place of that one.
    """
    machine = result["environment"]
    machine_facts = [
        machine.get("cpu"),
        machine["device"],
        f"{machine['threads']} threads",
        f"torch {machine['torch']}",
    ]
    lines = [f"## {result['name']}", "", ", ".join(filter(None, [*machine_facts, result.get("date")])), ""]
    if "text" in result:
        return "\n".join([*lines, result["text"], "", f"{len(result['rows']):,} rows are in the JSON file."]) + "\n"
    lines += ["| row | value | interval | unit | n |", "|---|---|---|---|---|"]
    notes = dict.fromkeys(row["note"] for row in result["rows"] if row.get("note"))
    for row in result["rows"]:
        interval = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        number = f" [{list(notes).index(row['note']) + 1}]" if row.get("note") else ""
        lines.append(f"| {row['name']}{number} | {row['value']:.4g} | {interval} | {row['unit']} | {row['n']:,} |")
    lines += ["", COLUMNS, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    lines += ["", *(f"Left out: {name} ({reason})" for name, reason in result.get("left_out", {}).items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
