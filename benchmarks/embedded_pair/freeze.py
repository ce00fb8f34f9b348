"""`python -m benchmarks.embedded_pair.freeze [--out DIR]`: write the four corpus files from the running
Python's standard library.

The files in the package came from CPython 3.11.7; another version gives another text, and then another pair of models.
"""

import argparse
import gzip
import hashlib
import json
import platform
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.embedded_pair.corpus import Snippet, collect
from benchmarks.embedded_pair.dialogues import Dialogue, is_held_out, make_dialogues
from crosscoders.common.files import write_bytes, write_json
from diffing.demo import ASSETS


def freeze(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write the four files and `frozen.json` (Python version, counts, sha256 of each text), which is also returned."""
    corpus = collect()
    raw: dict[bool, list[Snippet]] = {True: [], False: []}
    for snippet in corpus.snippets:
        raw[is_held_out("fact", snippet.key, seed)].append(snippet)
    # The first n held-out texts must be a fair sample; training shuffles for itself.
    random.Random(seed).shuffle(raw[True])
    files: dict[str, list[Any]] = {
        "raw_train": [{"text": s.text, "group": "raw"} for s in raw[False]],
        "raw_heldout": [{"text": s.text, "group": "raw"} for s in raw[True]],
        "dialogues_train": make_dialogues(corpus.facts, held_out=False, seed=seed),
        "dialogues_heldout": make_dialogues(corpus.facts, held_out=True, seed=seed),
    }
    record: dict[str, Any] = {"python": platform.python_version(), "seed": seed, "files": {}}
    for name, rows in files.items():
        text = to_lines(rows)
        write_bytes(folder / f"{name}.jsonl.gz", gzip.compress(text, compresslevel=9, mtime=0))
        record["files"][name] = {"rows": len(rows), "sha256_of_text": hashlib.sha256(text).hexdigest()}
    write_json(folder / "frozen.json", record)
    return record


def to_lines(rows: Iterable[Mapping[str, Any] | Dialogue]) -> bytes:
    """Write rows as JSON lines in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded_pair.freeze", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ASSETS / "corpus", help="folder of the corpus files")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the dialogues")
    options = parser.parse_args(arguments)
    json.dump(freeze(options.out, options.seed), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
