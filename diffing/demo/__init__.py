"""The embedded pair: a tiny base model, its chat fine-tune, two null models, and the text they were made of.

`model_folder` and `document_file` give the places of the packaged files. Importing this loads nothing.
"""

import gzip
import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
MODELS = ("base", "tuned", "placebo", "format_only")
"""`placebo` and `format_only`: the fine-tune of `tuned`, but on raw text only and on documentation dialogues only."""
DOCUMENTS = ("raw_train", "raw_heldout", "dialogues_train", "dialogues_heldout")


def model_folder(name: str) -> Path:
    """Return the Hugging Face folder of one embedded model.

    Raises:
        ValueError: there is no model of that name.
    """
    return ASSETS / _known(name, MODELS, "model")


def document_file(name: str) -> Path:
    """Return the JSON lines, gzipped, of one part of the embedded corpus.

    Raises:
        ValueError: there is no part of that name.
    """
    return ASSETS / "corpus" / f"{_known(name, DOCUMENTS, 'document file')}.jsonl.gz"


def _known(name: str, choices: tuple[str, ...], kind: str) -> str:
    if name not in choices:
        raise ValueError(f"there is no embedded {kind} {name!r}. Use one of {', '.join(choices)}.")
    return name


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of one file of the frozen corpus."""
    with gzip.open(document_file(name), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
