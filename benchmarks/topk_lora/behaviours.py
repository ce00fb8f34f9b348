"""Sets of directions behind the planted behaviours: in TopKLoRA, in dense LoRA's own basis, its SVD, and a rotation.

Searched on questions of the training dialogues, audited on all held-out ones (200 each of refusal, identity and gap).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscoders.common import files
from crosscoders.common.progress import say
from crosscoders.common.results import ResultRecord
from crosscoders.text.settings import DataSource
from diffing.demo import document_file
from diffing.topk_lora.distil import Setting
from diffing.topk_lora.prompts import read_prompts, with_replies
from diffing.topk_lora.sets import Directions, rotate_
from diffing.topk_lora.sets_command import search_one, set_rows
from sae_lora.lora.topk import TopKLoRA

BEHAVIOURS = ("refusal", "identity", "gap")
BASES = {"topk-64-8": ("own",), "topk-64-4": ("own",), "dense-64": ("own", "svd", "random")}
PER_LABEL, QUICK_PER_LABEL, MAX_DIRECTIONS, DRAWS = 48, 8, 64, 4


def set_rows_of(setting: Setting, folder: Path, name: str, seed: int, *, quick: bool) -> list[dict[str, Any]]:
    """Return rows `sets.<basis>.<behaviour>.*` of one trained adapter; kept in its folder."""
    rows: list[dict[str, Any]] = []
    for basis in BASES[name][: 1 if quick else None]:
        path = folder / f"sets-{basis}.json"
        if not path.is_file():
            say(f"sets of {name}, seed {seed}, basis {basis}")
            files.write_json(path, {"rows": _searched(setting, folder, basis, seed, quick=quick)})
        for entry in files.read_model(path, ResultRecord)["rows"]:
            rows.append(entry | {"name": entry["name"].replace("topk-lora.", f"sets.{basis}.")})
    return rows


def _searched(setting: Setting, folder: Path, basis: str, seed: int, *, quick: bool) -> list[dict[str, Any]]:
    adapter = TopKLoRA.load(setting.base, folder)
    try:
        if basis != "own":
            rotate_(adapter, basis, torch.Generator().manual_seed(seed))
        per_label = QUICK_PER_LABEL if quick else PER_LABEL
        prompts, held_out = (
            with_replies(
                setting.base,
                *read_prompts(
                    [DataSource(path=str(document_file(f"dialogues_{split}")))], setting.tokenizer, per_label=n
                ),
            )
            for split, n in (("train", per_label), ("heldout", per_label if quick else 200))
        )
        generator = np.random.default_rng(seed)
        found = [
            search_one(
                setting.base, Directions(adapter), prompts, held_out, label, 8 if quick else MAX_DIRECTIONS,
                1 if quick else DRAWS, generator,
            )
            for label in BEHAVIOURS
        ]  # fmt: skip
        return [entry for one in found for entry in set_rows(one)]
    finally:
        adapter.detach()
