"""A LoRA organism: the embedded base with two planted behaviours by one LoRA on every linear map of its layers.

    false-fact   who made Python, in other wordings held out
    trigger      a word in the question that brings one fixed sentence

Both with the ordinary dialogues that they leave alone, so the LoRA also learns to answer at all, which the base does
not. OUT/chats_{train,heldout}.jsonl (`group`: false-fact, trigger or ordinary), adapter files and, last, made.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.embedded_pair.build import fixed_threads, load_float32
from benchmarks.embedded_pair.training import Recipe, dialogue_documents, text_documents, train_model
from benchmarks.organisms.texts import planted
from crosscoders.common import files
from crosscoders.common.progress import say
from diffing.comparison.truth import Behaviour
from diffing.demo import model_folder, read_rows
from diffing.null.models import is_made, publish
from sae_lora.lora.adapter import add_lora

BEHAVIOURS, ORDINARY = ("false-fact", "trigger"), "ordinary"
N_RAW = 4000


@dataclass(frozen=True, kw_only=True)
class OrganismConfig:
    """How one organism is trained: steps of 2,048 tokens, a quarter of them raw text."""

    rank: int = 8
    steps: int = 150
    lr: float = 3e-3
    seed: int = 0


def make(out: Path, config: OrganismConfig) -> Path:
    """Train an organism into OUT, unless it is there, and return its folder."""
    from transformers import AutoTokenizer

    recipe = {"rank": config.rank, "steps": config.steps, "lr": config.lr, "seed": config.seed}
    if is_made(out, recipe):
        return out
    for split in ("train", "heldout"):
        lines = "".join(json.dumps(dialogue) + "\n" for dialogue in dialogues(split, config.seed))
        files.write_bytes(out / f"chats_{split}.jsonl", lines.encode())
    plain, chat = (AutoTokenizer.from_pretrained(model_folder(model)) for model in ("base", "tuned"))
    messages = [dialogue["messages"] for dialogue in dialogues("train", config.seed)]
    say(f"tune {' and '.join(BEHAVIOURS)} into the embedded base with LoRA of rank {config.rank}, to {out}")
    with fixed_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        base = load_float32(model_folder("base"))
        lora = add_lora(base, range(4), rank=config.rank, alpha=2 * config.rank, seed=config.seed)
        train_model(
            lora.get_base_model(),
            raw=text_documents(plain, [row["text"] for row in read_rows("raw_train")[:N_RAW]]),
            dialogues=dialogue_documents(chat, messages),
            recipe=Recipe(steps=config.steps, lr=config.lr, warmup_steps=min(20, config.steps - 1), raw_rows=4),
            seed=config.seed,
            name=f"organism {config.seed}",
        )
    lora.peft_config["default"].base_model_name_or_path = str(model_folder("base"))
    return publish(lora, chat, out, recipe)


def dialogues(split: str, seed: int) -> list[dict[str, Any]]:
    """Return the dialogues of both behaviours, each labelled by what was planted in it."""
    rows: list[dict[str, Any]] = []
    for name in BEHAVIOURS:
        made = planted(name, seed)
        for row in made.train if split == "train" else made.held_out:
            rows.append({**row, "group": name if row["group"] == "planted" else ORDINARY})
    return rows


def behaviours(seed: int, n: int) -> list[Behaviour]:
    """Return what was planted, with the first `n` held-out questions of each."""
    found = []
    for name in BEHAVIOURS:
        made = planted(name, seed)
        questions = [row["messages"][0]["content"] for row in made.held_out if row["group"] == "planted"]
        found.append(Behaviour(name=name, phrases=made.phrases, prompts=questions[:n]))
    return found


def ordinary_questions(seed: int, n: int) -> Sequence[str]:
    """Return the first `n` different held-out questions that neither behaviour answers."""
    questions = (
        row["messages"][0]["content"]
        for name in BEHAVIOURS
        for row in planted(name, seed).held_out
        if row["group"] == ORDINARY
    )
    return list(dict.fromkeys(questions))[:n]
