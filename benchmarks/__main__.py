"""`python -m benchmarks list`, `run NAME [--quick] [--json] [--out FOLDER]`, `report [--out FOLDER]`.

A benchmark is a module with a docstring and `run(quick: bool) -> dict`, whose rows follow docs/formats.md.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from crosscoders import store
from crosscoders.errors import InputError, nearest

BENCHMARKS = {
    "demo-pair": "benchmarks.demo_pair",
    "latent-scaling": "benchmarks.latent_scaling",
    "planted": "benchmarks.planted",
    "throughput": "benchmarks.throughput",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the benchmarks")
    run = commands.add_parser("run", help="run one and keep its rows")
    run.add_argument("name")
    run.add_argument("--quick", action="store_true", help="a small version, for trying it out")
    run.add_argument("--json", action="store_true", help="print the result as one JSON object")
    report = commands.add_parser("report", help="print the kept rows as Markdown tables")
    for command in (run, report):
        command.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            for name, module in BENCHMARKS.items():
                print(f"{name:<16} {(importlib.import_module(module).__doc__ or '').splitlines()[0]}")
        elif args.command == "run":
            found = run_one(args.name, quick=args.quick, out=args.out)
            print(json.dumps(found, indent=1) if args.json else markdown(found))
        else:
            for path in sorted(args.out.glob("*.json")):
                print(markdown(store.read_json(path)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def run_one(name: str, *, quick: bool, out: Path) -> dict[str, Any]:
    """Run a benchmark and keep its result as OUT/NAME.json.

    Raises:
        InputError: there is no such benchmark.
    """
    from crosscoders.provenance import environment

    if name not in BENCHMARKS:
        raise InputError(
            f"unknown benchmark {name!r}{nearest(name, list(BENCHMARKS))} There are {', '.join(BENCHMARKS)}."
        )
    found = {
        "config": {"quick": quick},
        "environment": environment(),
        **importlib.import_module(BENCHMARKS[name]).run(quick),
    }
    store.write_json(out / f"{name}{'-quick' if quick else ''}.json", found)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The rows as one Markdown table."""
    lines = [f"## {found['name']}", "", "| row | value | interval | unit | n |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        interval = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        lines.append(f"| {row['name']} | {row['value']:.4g} | {interval} | {row['unit']} | {row['n']:,} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
