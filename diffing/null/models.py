"""Null models that the command makes itself: the base with rounded weights, and the base tuned on raw text.

A folder is finished once it holds made.json, which says how it was made; an unfinished one is made again.
"""

import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common import files
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.common.progress import Progress, say
from crosscoders.common.records import Record
from crosscoders.common.seals import checksum
from crosscoders.models import hooks
from crosscoders.models.generation import sampling
from crosscoders.models.loading import load_model
from crosscoders.models.names import hash_model, identity, load_auto, quiet_transformers
from crosscoders.text.documents import read_source
from crosscoders.text.packing import missing_borders
from crosscoders.text.refusals import Refusals
from crosscoders.text.settings import DataConfig, DataSource
from crosscoders.text.tokens import tokenize_text
from diffing.finetuning import Schedule, finetune
from diffing.null.movement import match_change_
from sae_lora.lora.adapter import add_lora

SELF = "self"
_SAMPLED = 256
"""Rows that are sampled together."""


def round_model(base: str, out: Path, bits: int) -> Path:
    """Save the base model with every weight rounded to `bits` significant bits (bfloat16 has 8), in its own dtype.

    Raises:
        InputError: the rounding changes nothing; `out` holds another model.
    """
    recipe = {"base": hash_model(base), "rounded_bits": bits}
    if is_made(out, recipe):
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
    return publish(model, tokenizer, out, recipe)


def round_to_bits(weight: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
    """Return the nearest numbers with `bits` significant bits, ties to even; through float32, in the dtype of
    `weight`."""
    mantissa, exponent = torch.frexp(weight.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(weight.dtype)


class Placebo(NamedTuple):
    """How a placebo is trained."""

    text: str
    """File, folder or `datasets` id, or SELF: what the base samples itself."""
    steps: int
    lr: float
    """Peak learning rate."""
    rows: int
    """Rows of a step."""
    rank: int | None = None
    """Of its LoRA; None: all weights are tuned."""
    change: float | None = None
    """Weight change to which its own is scaled at the end; None: as it comes."""


def train_placebo(base: str, out: Path, placebo: Placebo, *, context_length: int, seed: int, device: str) -> Path:
    """Tune the base on raw text, or on its own samples, and save it, whole or as a LoRA adapter.

    Next-token loss on rows of `context_length` tokens, documents end to end; Adam (0.9, 0.95) without decay, gradient
    norm clipped at 1, rate up over the first tenth of the steps and linearly down to 0; float32. LoRA goes to every
    linear map of the decoder layers, alpha = 2 rank.

    Raises:
        InputError: the text is shorter than one row; `out` holds another model.
        CorruptData: the loss is not finite.
    """
    n_rows = placebo.steps * placebo.rows
    given = (
        None if placebo.text == SELF else text_rows(load_auto(base, "tokenizer"), placebo.text, context_length, n_rows)
    )
    text = SELF if given is None else {"name": placebo.text, "hash": checksum(given.numpy().tobytes())}
    recipe = {"base": hash_model(base), "seed": seed, "context_length": context_length, "train_placebo": text}
    recipe |= {f"placebo_{name}": getattr(placebo, name) for name in ("steps", "lr", "rows", "rank", "change")}
    if is_made(out, recipe):
        return out
    model, tokenizer = load_base(base, "float32")
    rows = given
    if rows is None:
        model = model.to(choose_device(device))
        rows = sampled_rows(model, tokenizer, n_rows, context_length, seed)
    said = "its own samples" if given is None else placebo.text
    say(f"train a placebo of {base} on {n_rows * context_length:,} tokens of {said}, to {out}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the adapter's start
        if placebo.rank is not None:
            layers = range(len(hooks.decoder_layers(model)))
            model = add_lora(model, layers, rank=placebo.rank, alpha=2 * placebo.rank, seed=seed)
        _tune(model.to(choose_device(device)), rows, placebo, seed)
    if placebo.change is not None:
        factor = match_change_(model.cpu(), load_base(base, "float32")[0], placebo.change)
        say(f"its change of the weights is scaled by {factor:.3g}, to {placebo.change:.1%} of their norm")
    return publish(model, tokenizer, out, recipe)


def text_rows(tokenizer: Any, data: str, length: int, n_rows: int) -> Int[Tensor, "rows length"]:
    """Return documents end to end, EOS between them where the tokenizer has no BOS, cut into rows: the first `n_rows`,
    or all that there are. No document is read that they do not need.

    Raises:
        InputError: a document is a chat, too many rows cannot be read, or there is not one whole row.
    """
    documents: list[list[int]] = []
    n_tokens, refusals = 0, Refusals(DataConfig.max_refused)
    for document in read_source(DataSource(path=data)):
        refusals.n_rows += 1
        if document.refused is not None:
            refusals.add(document.refused)
            continue
        if not isinstance(document.content, str):
            raise InputError(f"{document.where} is a chat; a placebo is tuned on raw text only. Give plain text.")
        documents.append(tokenize_text(tokenizer, document.content)[0])
        n_tokens += len(documents[-1])
        if n_tokens >= n_rows * length:
            break
    refusals.finish()
    firsts = np.array([ids[0] for ids in documents[1:]], dtype=np.int64)
    lasts = np.array([ids[-1] for ids in documents[:-1]], dtype=np.int64)
    for number in missing_borders(firsts, lasts, tokenizer).nonzero()[0]:
        documents[number].append(tokenizer.eos_token_id)
    ids = [token for document in documents for token in document]
    if len(ids) < length:
        raise InputError(f"{data!r} has {len(ids):,} tokens, less than one row of {length:,}. Give more text.")
    return torch.tensor(ids[: min(n_rows, len(ids) // length) * length]).view(-1, length)


@torch.inference_mode()
def sampled_rows(model: Any, tokenizer: Any, n_rows: int, length: int, seed: int) -> Int[Tensor, "rows length"]:
    """Return rows that the model samples itself, at temperature 1 from the beginning of sequence, past any EOS.

    On such rows, each read once, the expected gradient of the model's own loss is 0.

    Raises:
        InputError: the tokenizer has no token to begin with.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("the tokenizer has neither BOS nor EOS, so no sample can begin. Give text to train_placebo.")
    parts, progress = [], Progress("samples", total=n_rows, unit="row")
    with torch.random.fork_rng(), sampling(model), quiet_transformers():
        torch.manual_seed(seed)
        for first in range(0, n_rows, _SAMPLED):
            ids = torch.full((min(_SAMPLED, n_rows - first), 1), start, device=hooks.core_model(model).device)
            drawn = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length - 1)
            parts.append(drawn.cpu())
            progress.update(len(ids))
    progress.close()
    return torch.cat(parts).clone()


def _tune(model: Any, rows: Int[Tensor, "rows length"], placebo: Placebo, seed: int) -> None:
    """Tune the weights that require gradients."""
    steps, lr, n_rows = placebo.steps, placebo.lr, placebo.rows
    device = next(model.parameters()).device
    order = _row_order(len(rows), seed)
    finetune(
        model,
        (rows[[next(order) for _ in range(n_rows)]].to(device) for _ in range(steps)),
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False, **_no_images(model, ids)).loss,
        torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=lr, betas=(0.9, 0.95)),
        Schedule(steps, lr, warmup_steps=steps // 10, decay="linear"),
        tokens_per_step=n_rows * rows.shape[1],
        name="placebo",
    )


def _no_images(model: Any, ids: Int[Tensor, "rows length"]) -> dict[str, Tensor]:
    """Return what Gemma-3 with its vision tower asks for in training: which tokens are of images."""
    core = hooks.core_model(model)
    is_asked = hasattr(core.config, "vision_config") and "token_type_ids" in inspect.signature(core.forward).parameters
    return {"token_type_ids": torch.zeros_like(ids)} if is_asked else {}


def _row_order(n: int, seed: int) -> Iterator[int]:
    """Yield row numbers without end, in a new order in every epoch."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(range(n), n)


def load_base(base: str, dtype: str) -> tuple[Any, Any]:
    """Load the whole base model and its tokenizer. Eager attention: a fine-tune of Gemma-2 needs it."""
    return load_model(base, dtype, attention="eager"), load_auto(base, "tokenizer")


def publish(model: Any, tokenizer: Any, out: Path, recipe: dict[str, Any]) -> Path:
    """Write model and tokenizer to `out`, made.json last."""
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    files.write_json(out / "made.json", recipe)
    return out


def is_made(out: Path, recipe: dict[str, Any]) -> bool:
    """Tell whether `out` holds the finished model that was made in this way; text is known by its tokens, wherever it
    lies.

    Raises:
        InputError: it holds another one.
    """
    if not (out / "made.json").is_file():
        return False
    recorded = files.read_model(out / "made.json", Record)
    for key, value in recipe.items():
        before = recorded.get(key)
        if identity(before) != identity(value):
            raise InputError(
                f"{out} holds a null model made with {key} = {before!r}, now {value!r}. Choose another --out."
            )
    return True
