r"""KL of the spliced, adapted model to the model as it is, and what need not be computed twice.

kl_n = sum_v p_v (log p_v - log q_v)    p: no splice, no adapter; q: both; float32, `crosscoders.metrics.kl`
loss mean:  sum_n kl_n / N              over the N positions that are not padding
loss sum:   sum_n kl_n / rows           the published one
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosscoders import hooks, metrics
from sae_lora.adapter import first_layer_after, lora_off
from sae_lora.dictionary import FrozenDictionary
from sae_lora.inputs import Batch
from sae_lora.splicing import Observe, core_model, splice


class _KlTotal(torch.autograd.Function):
    """sum_n KL(p_n || q_n) over the rows that are used; its gradient, softmax(q) - p, is made in the forward pass, so
    that no probability is computed twice and none is kept."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, used: Tensor, chunk_tokens: int) -> Tensor:
        total = torch.zeros((), device=student.device)
        slope = torch.empty_like(student) if ctx.needs_input_grad[1] else None
        for start in range(0, len(student), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            log_p, log_q = metrics.log_probs(teacher[rows]), metrics.log_probs(student[rows])
            p = log_p.exp()
            total += metrics.kl(log_p, log_q, p)[used[rows]].sum()
            if slope is not None:
                slope[rows] = log_q.exp_().sub_(p)
        if slope is not None:
            slope[(~used).nonzero().squeeze(1)] = 0  # few rows; a mask would go over all
            ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return None, slope * grads[0], None, None


def kl_total(
    teacher: Float[Tensor, "tokens vocab"],
    student: Float[Tensor, "tokens vocab"],
    chunk_tokens: int = 512,
    used: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of KL(teacher || student) over tokens, or over those that are used, nats; differentiable in the student.

    Float32 probabilities exist for one chunk at a time.
    """
    if used is None:
        used = torch.ones(len(student), dtype=torch.bool, device=student.device)
    found: Tensor = _KlTotal.apply(teacher, student, used, chunk_tokens)
    return found


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


class Prefix(NamedTuple):
    """Where teacher and student part, as LoRA is on later layers only."""

    hook_point: str
    as_tuple: bool
    """Whether the layers of this architecture return a tuple, of which the activation is the first entry."""


class States(NamedTuple):
    """What a batch needs of the frozen model, padded as its ids are."""

    x_hat: Float[Tensor, "rows seq d_model"]
    """What stands at the point where passes start, with the dictionary spliced in if it is its own."""
    final: Float[Tensor, "rows seq d_model"]
    """What the head reads, after the last norm, without adapter and dictionary."""


def find_prefix(model: Any, hook_point: str, batch: Batch) -> Prefix | None:
    """The prefix up to a hook point, if starting there gives the same logits bit for bit."""
    kinds: list[bool] = []
    first = hooks.decoder_layers(model)[0]
    handle = first.register_forward_hook(lambda _m, _a, out: kinds.append(isinstance(out, tuple)))
    with torch.no_grad():
        whole = logits(model, batch)
        handle.remove()
        prefix = Prefix(hook_point, any(kinds))
        with start_at(model, prefix, activations(model, hook_point, batch)):
            resumed = logits(model, batch)
    return prefix if torch.equal(whole, resumed) else None


def activations(model: Any, hook_point: str, batch: Batch) -> Float[Tensor, "rows seq d_model"]:
    """At the hook point; no layer above it runs."""
    found = hooks.run_to(model, [hook_point], batch.ids, batch.attention_mask)[hook_point]
    return found.clone()  # not an inference tensor: the backward pass may keep it


@contextlib.contextmanager
def start_at(model: Any, prefix: Prefix, x: Float[Tensor, "rows seq d_model"]) -> Iterator[None]:
    """Passes in the block start at the hook point, with x there; the layers below cost nothing."""
    n_below = first_layer_after(prefix.hook_point)
    with hooks.bypass(model, n_below, as_tuple=prefix.as_tuple), hooks.replace(model, prefix.hook_point, lambda _: x):
        yield


def states(model: Any, dictionary: FrozenDictionary, batch: Batch, keep_ids: Sequence[int]) -> States:
    """Of the model without adapter, around one dictionary; x_hat at the last point of the residual stream that is at or
    before its own."""
    found: list[Tensor] = []
    decoder = core_model(model).base_model
    with torch.no_grad(), lora_off(model):
        handle = decoder.register_forward_hook(lambda _m, _a, out: found.append(out.last_hidden_state))
        try:
            decoder(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            handle.remove()
        start = hooks.entry_point(dictionary.hook_point)
        is_own = start == dictionary.hook_point
        with splice(model, dictionary, keep_ids=keep_ids) if is_own else contextlib.nullcontext():
            return States(activations(model, start, batch), found[0])


def head(model: Any, batch: Batch, final: Float[Tensor, "rows seq d_model"]) -> Float[Tensor, "rows seq vocab"]:
    """Logits of final hidden states, as the model itself makes them."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder = vars(core_model(model).base_model)
    decoder["forward"] = lambda *_args, **_settings: BaseModelOutputWithPast(last_hidden_state=final)
    try:
        return logits(model, batch)
    finally:
        del decoder["forward"]


def batch_kl(
    model: Any,
    dictionaries: Sequence[FrozenDictionary],
    batch: Batch,
    keep_ids: Sequence[int],
    *,
    chunk_tokens: int = 512,
    prefix: Prefix | None = None,
    stored: States | None = None,
    observe: Observe | None = None,
) -> Float[Tensor, ""]:
    """Sum of KL over the positions of a batch that are not padding, with its graph.

    prefix: what lies below it runs once. stored: what was kept of this batch; the teacher is then its head alone, and
    with a prefix the lowest dictionary and what lies below are not run at all. observe: as in `splice`.
    """
    used = batch.attention_mask.bool().flatten()
    with contextlib.ExitStack() as stack:
        if prefix is not None:
            x = activations(model, prefix.hook_point, batch) if stored is None else stored.x_hat
            stack.enter_context(start_at(model, prefix, x))
        with torch.no_grad(), lora_off(model):
            teacher = (logits(model, batch) if stored is None else head(model, batch, stored.final)).flatten(0, 1)
        to_splice = [d for d in dictionaries if stored is None or prefix is None or d.hook_point != prefix.hook_point]
        if to_splice:
            stack.enter_context(splice(model, to_splice, keep_ids=keep_ids, observe=observe))
        with lora_dropout(model):
            student = logits(model, batch).flatten(0, 1)
    return kl_total(teacher, student, chunk_tokens, used)


def scaled(total: Float[Tensor, ""], batch: Batch, loss: Literal["mean", "sum"]) -> Float[Tensor, ""]:
    """The loss of a step."""
    return total / (batch.attention_mask.sum() if loss == "mean" else len(batch.ids))
