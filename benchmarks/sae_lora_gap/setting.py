"""The embedded base model, its documents in three parts, and what every part of the benchmark reads of them.

Settings were chosen on `development`: every 20th document of raw_train, which no SAE and no LoRA has seen. Results are
of raw_heldout, which the model has not seen either.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoders.common import files
from crosscoders.models import resume
from crosscoders.text.padding import Batch
from diffing.demo import ASSETS, model_folder, read_rows
from sae_lora.fitting.inputs import Plan, load_model, make_plan
from sae_lora.fitting.settings import TextConfig
from sae_lora.splicing import kept_positions

HOOK_POINT = "blocks.1.hook_resid_post"
CONTEXT, ROWS = 256, 16
CPU = torch.device("cpu")
BASE = str(model_folder("base"))
HELD_OUT = str(ASSETS / "corpus" / "raw_heldout.jsonl.gz")


class Size(NamedTuple):
    """How much of everything."""

    tokens: int
    """Training tokens of every SAE and of every fit, of the 1,080,000 that there are."""
    held_out: int
    """Tokens that results are measured on; 43,876 is the whole file."""
    rounds: int
    """Rounds of the speed measurements."""
    end_to_end_epochs: tuple[int, ...]
    """Times that each end-to-end SAE of the race reads the training tokens."""


FULL = Size(tokens=800_000, held_out=43_876, rounds=15, end_to_end_epochs=(1, 2, 4, 8))
QUICK = Size(tokens=60_000, held_out=8_000, rounds=3, end_to_end_epochs=(1,))


def split(work: Path) -> dict[str, str]:
    """Return the files of the training and the development documents."""
    import json

    rows = read_rows("raw_train")
    parts = {"train": [r for i, r in enumerate(rows) if i % 20], "development": rows[::20]}
    for name, chosen in parts.items():
        files.write_bytes(work / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in chosen).encode())
    return {name: str(work / f"{name}.jsonl") for name in parts}


def text(data: str, n_tokens: int) -> TextConfig:
    """Return how documents are read everywhere."""
    return TextConfig(data=data, n_tokens=n_tokens, context_length=CONTEXT, batch_rows=ROWS, device="cpu")


def open_base(data: str, n_tokens: int) -> tuple[Plan, nn.Module]:
    """Open the documents, and the model without any dictionary."""
    config = text(data, n_tokens)
    plan = make_plan(config, BASE, [])
    return plan, load_model(plan, config, CPU)


def batches(plan: Plan) -> Iterator[Batch]:
    """Yield all documents once."""
    return plan.batches(ROWS, CPU)


def activations(plan: Plan, model: nn.Module, hook_point: str = HOOK_POINT) -> Float[Tensor, "tokens d_model"]:
    """Return the activations at the hook point, of all tokens that a splice replaces."""
    return torch.cat(
        [
            resume.activations(model, hook_point, b)[~kept_positions(b.ids, b.attention_mask, plan.keep_ids)]
            for b in batches(plan)
        ]
    )
