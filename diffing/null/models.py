"""Null models that the command makes itself: the base with rounded weights, and the base tuned on raw text.

A folder is finished once it holds made.json, which says how it was made; an unfinished one is made again.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common import files
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.progress import Progress, say
from crosscoders.common.records import Record
from crosscoders.models.names import hash_model, quiet_transformers
from crosscoders.text.documents import read_source
from crosscoders.text.settings import DataSource
from crosscoders.text.tokens import tokenize_text
from diffing.null.settings import NullSettings


def round_model(base: str, out: Path, bits: int) -> Path:
    """Save the base model with every weight rounded to `bits` significant bits (bfloat16 has 8), in its own dtype.

    Raises:
        InputError: the rounding changes nothing; `out` holds another model.
    """
    made = {"base": hash_model(base), "rounded_bits": bits}
    if is_made(out, made):
        return out
    say(f"round the weights of {base} to {bits} significant bits, to {out}")
    model, tokenizer = load_base(base, "auto")
    changed = False
    with torch.no_grad():
        for weight in model.parameters():
            rounded = round_to_bits(weight, bits)
            changed = changed or not torch.equal(rounded, weight)
            weight.copy_(rounded)
    if not changed:
        raise InputError(f"no weight of {base!r} has more than {bits} significant bits. Lower --rounded-bits.")
    return publish(model, tokenizer, out, made)


def round_to_bits(weight: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
    """The nearest numbers with `bits` significant bits, ties to even; through float32, in the dtype of `weight`."""
    mantissa, exponent = torch.frexp(weight.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(weight.dtype)


def train_placebo(base: str, out: Path, settings: NullSettings, context_length: int, seed: int) -> Path:
    """Tune the base on raw text and save it, whole or as a LoRA adapter.

    Next-token loss on rows of `context_length` tokens, documents end to end; Adam (0.9, 0.95) without decay, gradient
    norm clipped at 1, rate up over the first tenth of the steps and linearly down to 0; float32. LoRA goes to every
    linear layer but the head, alpha = 2 rank.

    Raises:
        InputError: the text is shorter than one row; `out` holds another model.
        CorruptData: the loss is not finite.
    """
    assert settings.train_placebo and settings.placebo_steps and settings.placebo_lr and settings.placebo_rows
    made = {"base": hash_model(base), "seed": seed, "context_length": context_length}
    made |= {
        name: getattr(settings, name)
        for name in ("train_placebo", "placebo_steps", "placebo_lr", "placebo_rows", "placebo_rank")
    }
    if is_made(out, made):
        return out
    model, tokenizer = load_base(base, "float32")
    rows = text_rows(tokenizer, settings.train_placebo, context_length)
    n_tokens = settings.placebo_steps * settings.placebo_rows * context_length
    say(f"train a placebo of {base} on {n_tokens:,} tokens of {settings.train_placebo}, to {out}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the adapter's start
        if settings.placebo_rank is not None:
            import peft

            rank = settings.placebo_rank
            shape = peft.LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
            )
            model = peft.get_peft_model(model, shape)
        _fit(model.to(choose_device(settings.device)), rows, settings, seed)
    return publish(model, tokenizer, out, made)


def text_rows(tokenizer: Any, data: str, length: int) -> Int[Tensor, "rows length"]:
    """Documents end to end, cut into rows; the rest at the end is left out.

    Raises:
        InputError: a document is a chat, or there is not one whole row.
    """
    ids: list[int] = []
    for document in read_source(DataSource(path=data)):
        if not isinstance(document.content, str):
            raise InputError(f"{document.where} is a chat; a placebo is tuned on raw text only. Give plain text.")
        ids += tokenize_text(tokenizer, document.content)[0]
    if len(ids) < length:
        raise InputError(f"{data!r} has {len(ids):,} tokens, less than one row of {length:,}. Give more text.")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _fit(model: Any, rows: Int[Tensor, "rows length"], settings: NullSettings, seed: int) -> None:
    steps, lr, n_rows = settings.placebo_steps, settings.placebo_lr, settings.placebo_rows
    assert steps and lr and n_rows
    device = next(model.parameters()).device
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.95))
    order = _row_order(len(rows), seed)
    progress = Progress("placebo", total=steps, unit="step")
    model.train()
    for step in range(steps):
        ids = rows[[next(order) for _ in range(n_rows)]].to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not math.isfinite(float(loss.detach())):
            raise CorruptData(f"the loss of the placebo is not finite at step {step}. Lower --placebo-lr = {lr}.")
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, steps // 10)) * (steps - step) / steps
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        progress.update(1)
    progress.close()
    model.eval()
    say(f"placebo: {steps:,} steps, last loss {float(loss.detach()):.3f} nats/token on {ids.numel():,} tokens")


def _row_order(n: int, seed: int) -> Iterator[int]:
    """Row numbers without end, in a new order in every epoch."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(range(n), n)


def load_base(base: str, dtype: str) -> tuple[Any, Any]:
    """The whole base model and its tokenizer. Eager attention: a fine-tune of Gemma-2 needs it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
        return model, AutoTokenizer.from_pretrained(base)


def publish(model: Any, tokenizer: Any, out: Path, made: dict[str, Any]) -> Path:
    """Write model and tokenizer to `out`, made.json last."""
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    files.write_json(out / "made.json", made)
    return out


def is_made(out: Path, made: dict[str, Any]) -> bool:
    """Whether `out` holds the finished model that was made in this way.

    Raises:
        InputError: it holds another one.
    """
    if not (out / "made.json").is_file():
        return False
    found = files.read_model(out / "made.json", Record)
    for key, value in made.items():
        if found.get(key) != value:
            raise InputError(
                f"{out} holds a null model made with {key} = {found.get(key)!r}, now {value!r}. Choose another --out."
            )
    return True
