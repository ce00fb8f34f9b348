r"""KL of the spliced, adapted model to the model as it is, and the route that runs the common lower layers once.

kl_n = sum_v p_v (log p_v - log q_v)    p: no splice, no adapter; q: both; float32, `crosscoders.metrics.kl`
loss mean:  sum_n kl_n / N              over the N positions that are not padding
loss sum:   sum_n kl_n / rows           the published one
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosscoders import hooks, metrics
from sae_lora.adapter import first_layer_after, lora_off
from sae_lora.dictionary import FrozenDictionary
from sae_lora.inputs import Batch
from sae_lora.splicing import splice


def kl_total(
    teacher: Float[Tensor, "tokens vocab"], student: Float[Tensor, "tokens vocab"], chunk_tokens: int = 512
) -> Float[Tensor, ""]:
    """Sum of KL(teacher || student) over tokens, nats. Float32 probabilities exist for one chunk at a time, in the
    backward pass too."""

    def of_chunk(p: Tensor, q: Tensor) -> Tensor:
        return metrics.kl(metrics.log_probs(p), metrics.log_probs(q)).sum()

    total = torch.zeros((), device=student.device)
    for p, q in zip(teacher.split(chunk_tokens), student.split(chunk_tokens), strict=True):
        total = total + (checkpoint(of_chunk, p, q, use_reentrant=False) if q.requires_grad else of_chunk(p, q))
    return total


def logits(model: Any, batch: Batch) -> Float[Tensor, "rows seq vocab"]:
    """One forward pass of the whole model."""
    found: Tensor = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return found


@contextlib.contextmanager
def lora_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout of LoRA alone; the model's own stays off, so that teacher and student differ by the splice only."""
    modules = [m for name, m in model.named_modules() if "lora_dropout" in name.split(".")]
    try:
        for module in modules:
            module.train()
        yield
    finally:
        for module in modules:
            module.eval()


@contextlib.contextmanager
def shared_prefix(model: Any, hook_point: str, batch: Batch) -> Iterator[None]:
    """Run the layers below a hook point once; passes in the block start there, on the same batch.

    Right where LoRA is on later layers only, so that teacher and student agree up to there.
    """
    kinds: list[bool] = []
    n_below = first_layer_after(hook_point)
    with contextlib.ExitStack() as stack:
        if n_below:
            layer = hooks.decoder_layers(model)[n_below - 1]
            stack.callback(layer.register_forward_hook(lambda _m, _a, out: kinds.append(isinstance(out, tuple))).remove)
        found = hooks.run_to(model, [hook_point], batch.ids, batch.attention_mask)[hook_point]
    x = found.clone()  # not an inference tensor: the backward pass may keep it
    with hooks.bypass(model, n_below, as_tuple=any(kinds)), hooks.replace(model, hook_point, lambda _: x):
        yield


def batch_kl(
    model: Any,
    dictionaries: Sequence[FrozenDictionary],
    batch: Batch,
    keep_ids: Sequence[int],
    *,
    chunk_tokens: int = 512,
    prefix: str | None = None,
) -> Float[Tensor, ""]:
    """Sum of KL over the positions of a batch that are not padding, with its graph.

    prefix: hook point below which everything is run once, see `shared_prefix`.
    """
    used = batch.attention_mask.bool()
    start = shared_prefix(model, prefix, batch) if prefix is not None else contextlib.nullcontext()
    with start:
        with torch.no_grad(), lora_off(model):
            teacher = logits(model, batch)[used]
        with splice(model, dictionaries, keep_ids=keep_ids), lora_dropout(model):
            student = logits(model, batch)[used]
    return kl_total(teacher, student, chunk_tokens)


def scaled(total: Float[Tensor, ""], batch: Batch, loss: Literal["mean", "sum"]) -> Float[Tensor, ""]:
    """The loss of a step."""
    return total / (batch.attention_mask.sum() if loss == "mean" else len(batch.ids))
