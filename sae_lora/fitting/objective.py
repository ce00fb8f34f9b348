r"""KL of the spliced, adapted model to the model as it is, and what need not be computed twice.

kl_n = sum_v p_v (log p_v - log q_v)    p: no splice, no adapter; q: both; float32, `crosscoders.models.predictions.kl`
loss mean:  sum_n kl_n / N              over the N positions that are not padding
loss sum:   sum_n kl_n / rows           the published one
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoders.models import points, predictions
from crosscoders.models.resume import Prefix, ToLogits, activations, final_states, head_alone, start_at
from crosscoders.text.padding import Batch
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.lora.adapter import lora_off
from sae_lora.splicing import Observe, splice


class _KlTotal(torch.autograd.Function):
    """sum_n KL(p_n || q_n), and its gradient in the student's final hidden states.

    The slope of KL in the logits of q is softmax(q) - p, so the gradient is made in the forward pass: no logit is
    computed twice, and none outlives its chunk.
    """

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, to_logits: ToLogits, chunk_tokens: int) -> Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[1] else None
        for start in range(0, len(student), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            log_p = predictions.log_probs(to_logits(teacher[rows]))
            final = student[rows].detach().requires_grad_(gradient is not None)
            with torch.enable_grad():
                logits = to_logits(final)
            log_q, p = predictions.log_probs(logits.detach()), log_p.exp()
            total += predictions.kl(log_p, log_q, p).sum()
            if gradient is not None:
                slope = log_q.exp_().sub_(p).to(logits.dtype)
                (gradient[rows],) = torch.autograd.grad(logits, final, slope)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grads[0], None, None


def kl_total(
    teacher: Float[Tensor, "tokens d_model"],
    student: Float[Tensor, "tokens d_model"],
    to_logits: ToLogits,
    chunk_tokens: int = 64,
) -> Float[Tensor, ""]:
    """Return the sum over tokens of KL(p || q), nats; differentiable in the student's final hidden states.

    p, q: what `to_logits` makes of the final hidden states of teacher and student, for one chunk of tokens at a time.
    """
    total: Tensor = _KlTotal.apply(teacher, student, to_logits, chunk_tokens)
    return total


@contextlib.contextmanager
def lora_dropout(model: nn.Module) -> Iterator[None]:
    """Switch on the dropout of LoRA alone; the model's own stays off, so that teacher and student differ by the splice
    only."""
    modules = [m for name, m in model.named_modules() if "lora_dropout" in name.split(".")]
    try:
        for module in modules:
            module.train()
        yield
    finally:
        for module in modules:
            module.eval()


class States(NamedTuple):
    """What a batch needs of the frozen model, padded as its ids are."""

    x_hat: Float[Tensor, "rows seq d_model"]
    """What stands at the point where passes start, with the dictionary spliced in if it is its own."""
    final: Float[Tensor, "rows seq d_model"]
    """What the head reads, after the last norm, without adapter and dictionary."""


def states(model: Any, dictionary: FrozenDictionary, batch: Batch, keep_ids: Sequence[int]) -> States:
    """Compute the states of the model without adapter, around one dictionary; x_hat at the last point of the residual
    stream that is at or before its own."""
    with torch.no_grad(), lora_off(model):
        final = final_states(model, batch)
        start = points.entry_point(dictionary.hook_point)
        is_own = start == dictionary.hook_point
        with splice(model, dictionary, keep_ids=keep_ids) if is_own else contextlib.nullcontext():
            return States(activations(model, start, batch), final)


def batch_kl(
    model: Any,
    dictionaries: Sequence[FrozenDictionary],
    batch: Batch,
    keep_ids: Sequence[int],
    *,
    chunk_tokens: int = 64,
    prefix: Prefix | None = None,
    stored: States | None = None,
    observe: Observe | None = None,
) -> Float[Tensor, ""]:
    """Return the sum of KL over the positions of a batch that are not padding, with its graph.

    prefix: what lies below it runs once. stored: what was kept of this batch; the teacher is then its head alone, and
    with a prefix the lowest dictionary and what lies below are not run at all. observe: as in `splice`.
    """
    with contextlib.ExitStack() as stack:
        if prefix is not None:
            x = activations(model, prefix.hook_point, batch) if stored is None else stored.x_hat
            stack.enter_context(start_at(model, prefix, x))
        with torch.no_grad(), lora_off(model):
            teacher = final_states(model, batch) if stored is None else stored.final
        to_splice = [d for d in dictionaries if stored is None or prefix is None or d.hook_point != prefix.hook_point]
        if to_splice:
            stack.enter_context(splice(model, to_splice, keep_ids=keep_ids, observe=observe))
        with lora_dropout(model):
            student = final_states(model, batch)
    used = batch.attention_mask.bool()
    with head_alone(model) as to_logits:
        return kl_total(teacher[used], student[used], to_logits, chunk_tokens)


def scaled(total: Float[Tensor, ""], batch: Batch, loss: Literal["mean", "sum"]) -> Float[Tensor, ""]:
    """Return the loss of a step."""
    return total / (batch.attention_mask.sum() if loss == "mean" else len(batch.ids))
