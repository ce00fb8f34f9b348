"""A LoRA organism: the embedded base with two planted behaviours, refusal and identity, by one LoRA on every map.

No part of `python -m benchmarks run decompose` yet: making and decomposing one was tried with a few steps, the
matrix of behaviours (`matrix_rows`) was never run.

WORK/seed-<n>/chats_{train,heldout}.jsonl, adapter/, run/: the dialogues of both, the LoRA, its decomposition
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from benchmarks.embedded_pair.build import load_float32
from benchmarks.embedded_pair.training import Recipe, dialogue_documents, text_documents, train_model
from crosscoders.common import files
from crosscoders.text.settings import DataSource
from diffing.decomposition import baselines
from diffing.decomposition.build import fresh
from diffing.decomposition.command import decompose
from diffing.decomposition.curves import by_site, masks_with, written
from diffing.decomposition.evaluation import explained
from diffing.decomposition.language import LanguageTask, deltas_of
from diffing.decomposition.model import Decomposition
from diffing.decomposition.saving import load_, read_description
from diffing.decomposition.settings import DecomposeSettings
from diffing.demo import document_file, model_folder, read_rows
from diffing.topk_lora.distil import Setting, open_setting
from diffing.topk_lora.prompts import DECISION_TOKENS, Prompts, given, read_prompts, with_replies
from sae_lora.lora.targets import find_targets

BEHAVIOURS = ("refusal", "identity")
RANK, PROMPTS = 4, 100
RECIPE = Recipe(steps=350, lr=3e-3, warmup_steps=20, raw_rows=4)
SIZES = (8, 32)
"""Pieces that are removed or added for each behaviour."""


def settings_of(folder: Path, seed: int) -> DecomposeSettings:
    """Return how the organism is decomposed: a quarter of the tokens is raw text."""
    data: list[list[str | DataSource]] = [
        [DataSource(path=str(folder / f"chats_{split}.jsonl"), weight=0.75),
         DataSource(path=str(document_file(f"raw_{split}")), weight=0.25, group="raw")]
        for split in ("train", "heldout")
    ]  # fmt: skip
    return DecomposeSettings(
        base=str(model_folder("base")), tuned=str(folder / "adapter"), data=data[0], eval_data=data[1],
        n_tokens=60_000, holdout_share=0.05, batch_rows=16, components=2 * RANK, steps=600, lr=3e-3, importance=1e-3,
        frequency=1e-4, adversarial=0.0, stochastic=1.0, out=str(folder / "run"), seed=seed,
    )  # fmt: skip


def make(folder: Path, seed: int) -> None:
    """Write the dialogues and train the LoRA, where they are not there."""
    import peft
    from transformers import AutoTokenizer

    for split in ("train", "heldout"):
        rows = [row for row in read_rows(f"dialogues_{split}") if row["group"] in BEHAVIOURS]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_bytes(folder / f"chats_{split}.jsonl", text.encode())
    if (folder / "adapter" / "adapter_config.json").is_file():
        return
    model = load_float32(model_folder("base"))
    tokenizers = [AutoTokenizer.from_pretrained(model_folder(name)) for name in ("base", "tuned")]
    targets = find_targets(model, range(len(model.model.layers)))
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, targets.config(rank=RANK, alpha=2 * RANK, dropout=0.0))
    chats = [row["messages"] for row in read_rows("dialogues_train") if row["group"] in BEHAVIOURS]
    train_model(
        adapted.base_model.model, raw=text_documents(tokenizers[0], [row["text"] for row in read_rows("raw_train")]),
        dialogues=dialogue_documents(tokenizers[1], chats), recipe=RECIPE, seed=seed, name=f"organism {seed}",
    )  # fmt: skip
    adapted.save_pretrained(folder / "adapter")
    tokenizers[1].save_pretrained(folder / "adapter")


def prompts_of(setting: Setting, folder: Path) -> Prompts:
    """Return held-out questions with the tuned model's replies."""
    source = [DataSource(path=str(folder / "chats_heldout.jsonl"))]
    return with_replies(setting.tuned, *read_prompts(source, setting.tokenizer, per_label=PROMPTS))


def selective(setting: Setting, decomposition: Decomposition, weights: Any) -> dict[str, list[tuple[str, int]]]:
    """Return the pieces in the order of what they write on one behaviour's dialogues less on the other's."""
    amounts: dict[str, dict[str, Float[torch.Tensor, " _"]]] = {}
    labels = np.array(setting.rows.group_names)[setting.rows.groups]
    for label in BEHAVIOURS:
        batches = [b.take(torch.from_numpy(np.flatnonzero(labels[b.numbers] == label))) for b in setting.held_out]
        batches = [b for b in batches if len(b.ids)]
        of_label = None
        if weights is not None:
            of_label = explained(decomposition, LanguageTask(), batches).mean
        amounts[label] = written(decomposition, LanguageTask(), batches, of_label)
    orders = {}
    for label, other in (BEHAVIOURS, BEHAVIOURS[::-1]):
        gains = [(float(a - b), name, i) for name in decomposition.names
                 for i, (a, b) in enumerate(zip(amounts[label][name], amounts[other][name], strict=True))]  # fmt: skip
        orders[label] = [(name, i) for _, name, i in sorted(gains, reverse=True)]
    return orders


def matrix_rows(
    setting: Setting, decomposition: Decomposition, prompts: Prompts, name: str, weights: Any
) -> dict[str, Any]:
    """Return each behaviour's share of prompts with a set removed from the tuned model, and alone on the base."""
    values: dict[str, Any] = {}
    orders = selective(setting, decomposition, weights)
    for size in SIZES:
        for label in BEHAVIOURS:
            chosen = by_site(orders[label][:size])
            for word, on in (("without", False), ("alone", True)):
                with decomposition.masked(masks_with(decomposition, chosen, on=on)):
                    hits = given(decomposition.model, prompts)[:, DECISION_TOKENS - 1]
                for other in BEHAVIOURS:
                    share = float(hits[prompts.of(other)].mean())
                    values[f"{name}.{word}_{label}.{size}.{other}"] = (share, "share of prompts")
    return values


def organism_run(work: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Make, decompose and measure one organism."""
    folder = work / f"seed-{seed}"
    make(folder, seed)
    settings = replace(settings_of(folder, seed), **changes)
    done = decompose(settings)
    values = {entry["name"].removeprefix("decompose."): (entry["value"], entry["unit"]) for entry in done["rows"]}
    setting = open_setting(settings)
    deltas = deltas_of(setting.base, setting.tuned, settings.sites)
    config, _ = read_description(Path(settings.out))
    decomposition = fresh(setting.tuned, deltas, config, is_relative=True)
    load_(decomposition, Path(settings.out))
    prompts = prompts_of(setting, folder)
    bases = {"svd": baselines.svd(deltas), "lora": baselines.lora(setting.tuned, list(deltas))}
    values |= matrix_rows(setting, decomposition, prompts, "pieces", True)
    for name, pieces in bases.items():
        values |= matrix_rows(setting, baselines.with_pieces(setting.tuned, deltas, pieces), prompts, name, None)
    for word, on in (("tuned", 1.0), ("base", 0.0)):
        with decomposition.masked(decomposition.constant(on, on)):
            hits = given(decomposition.model, prompts)[:, DECISION_TOKENS - 1]
        values |= {
            f"{word}.{label}": (float(hits[prompts.of(label)].mean()), "share of prompts") for label in BEHAVIOURS
        }
    return values
