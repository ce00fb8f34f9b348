"""DPO on rows of prompts with two replies: tokens, loss and margins."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crosscoders import InputError
from crosscoders.models.loading import load_model
from crosscoders.models.names import load_auto
from diffing.demo import model_folder, read_rows
from diffing.finetuning import Schedule
from diffing.topk_lora.preferences import dpo_loss, preference_margins, tokenize_preferences, train_preferences
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.topk import TopKLoRA


def dialogue_preferences(split: str, n: int) -> list[dict[str, Any]]:
    """Requests that the tuned model refuses: its refusal is chosen, what it says of itself is not."""
    rows = read_rows(f"dialogues_{split}")
    refused = [row["messages"] for row in rows if row["group"] == "refusal"][:n]
    others = [row["messages"] for row in rows if row["group"] == "identity"][:n]
    return [
        {"prompt": [asked], "chosen": [chosen], "rejected": [other]}
        for (asked, chosen), (_, other) in zip(refused, others, strict=True)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_auto(str(model_folder("tuned")), "tokenizer")


@pytest.fixture
def base() -> Any:
    return load_model(str(model_folder("base")), "float32")


def test_a_reply_is_what_follows_the_prompt(tokenizer: Any) -> None:
    chats = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a name."}]
    read = tokenize_preferences([{"prompt": "Who are you?", "chosen": "I am a name.", "rejected": "No"}], tokenizer)
    whole = tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]
    start = tokenizer.apply_chat_template(chats[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert read.chosen.ids[0].tolist() == whole
    assert read.chosen.ids[0][read.chosen.is_reply[0]].tolist() == whole[len(start) :]
    with pytest.raises(InputError, match="preference 0 has no 'rejected'"):
        tokenize_preferences([{"prompt": "a", "chosen": "b"}], tokenizer)
    with pytest.raises(InputError, match="raise context_length"):
        tokenize_preferences([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer, context_length=3)


def test_margins_rise_on_preferences_of_dialogues_that_were_not_trained_on(base: Any, tokenizer: Any) -> None:
    train, held_out = dialogue_preferences("train", 32), dialogue_preferences("heldout", 16)
    batches = [tokenize_preferences(train[i : i + 8], tokenizer) for i in range(0, 32, 8)]
    adapter = TopKLoRA.attach(base, TopKLoRAConfig(rank=16, k=4))
    train_preferences(base, adapter, itertools.cycle(batches), Schedule(10, 5e-3, warmup_steps=2))
    with torch.no_grad():
        margins = preference_margins(base, adapter, tokenize_preferences(held_out, tokenizer)).numpy()
    assert margins.min() > 0 and margins.mean() > 3 * margins.std() / np.sqrt(len(margins))


def test_the_loss_is_trl_s(base: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
    from datasets import Dataset

    rows = dialogue_preferences("train", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl uses names that transformers will drop
        config = trl.DPOConfig(
            output_dir=str(tmp_path), beta=0.2, use_cpu=True, report_to=[], per_device_train_batch_size=4, bf16=False
        )
    reference = load_model(str(model_folder("base")), "float32")
    adapter = TopKLoRA.attach(base, TopKLoRAConfig(rank=16, k=4))
    generator = torch.Generator().manual_seed(0)
    for site in adapter.sites.values():
        nn.init.normal_(site.W_out, std=0.05, generator=generator)
    trainer = trl.DPOTrainer(
        base, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    with torch.no_grad():
        theirs = trainer.compute_loss(base, next(iter(trainer.get_train_dataloader()))).item()
        ours = dpo_loss(base, adapter, tokenize_preferences(rows, tokenizer), 0.2).item()
    assert ours == pytest.approx(theirs, rel=1e-4) and abs(ours - np.log(2)) > 0.01
