r"""KL of the spliced, adapted model to the model as it is, and what need not be computed twice.

kl_n = sum_v p_v (log p_v - log q_v)    p: no splice, no adapter; q: both; float32, `crosscoders.metrics.kl`
loss mean:  sum_n kl_n / N              over the N positions that are not padding
loss sum:   sum_n kl_n / rows           the published one
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoders import hooks, metrics
from crosscoders.errors import InputError
from sae_lora.adapter import first_layer_after, lora_off
from sae_lora.dictionary import FrozenDictionary
from sae_lora.inputs import Batch
from sae_lora.splicing import Observe, core_model, splice

ToLogits = Callable[[Tensor], Tensor]
"""Final hidden states of any positions, (positions, d_model) -> their logits, (positions, vocab)."""


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
            log_p = metrics.log_probs(to_logits(teacher[rows]))
            final = student[rows].detach().requires_grad_(gradient is not None)
            with torch.enable_grad():
                found = to_logits(final)
            log_q, p = metrics.log_probs(found.detach()), log_p.exp()
            total += metrics.kl(log_p, log_q, p).sum()
            if gradient is not None:
                slope = log_q.exp_().sub_(p).to(found.dtype)
                (gradient[rows],) = torch.autograd.grad(found, final, slope)
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
    """Sum over tokens of KL(p || q), nats; differentiable in the student's final hidden states.

    p, q: what `to_logits` makes of the final hidden states of teacher and student, for one chunk of tokens at a time.
    """
    total: Tensor = _KlTotal.apply(teacher, student, to_logits, chunk_tokens)
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
    """The prefix up to a hook point, if starting there gives the same final hidden states bit for bit."""
    kinds: list[bool] = []
    first = hooks.decoder_layers(model)[0]
    handle = first.register_forward_hook(lambda _m, _a, out: kinds.append(isinstance(out, tuple)))
    with torch.no_grad():
        whole = final_states(model, batch)
        handle.remove()
        prefix = Prefix(hook_point, any(kinds))
        with start_at(model, prefix, activations(model, hook_point, batch)):
            resumed = final_states(model, batch)
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


def final_states(model: Any, batch: Batch) -> Float[Tensor, "rows seq d_model"]:
    """What the head reads, after the last norm, with its graph; the head runs on one position only."""
    found: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, out: Any) -> Any:
        found.append(out.last_hidden_state)
        out.last_hidden_state = out.last_hidden_state[:1, -1:]
        return out

    handle = hooks.decoder_stack(core_model(model)).register_forward_hook(cut)
    try:
        logits(model, batch)
    finally:
        handle.remove()
    return found[0]


def states(model: Any, dictionary: FrozenDictionary, batch: Batch, keep_ids: Sequence[int]) -> States:
    """Of the model without adapter, around one dictionary; x_hat at the last point of the residual stream that is at or
    before its own."""
    with torch.no_grad(), lora_off(model):
        final = final_states(model, batch)
        start = hooks.entry_point(dictionary.hook_point)
        is_own = start == dictionary.hook_point
        with splice(model, dictionary, keep_ids=keep_ids) if is_own else contextlib.nullcontext():
            return States(activations(model, start, batch), final)


class _Ended:
    """What layers hand to a head: final hidden states, and None where it asks for anything else."""

    def __init__(self, final: Tensor) -> None:
        self.last_hidden_state = final

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@contextlib.contextmanager
def head_alone(model: Any) -> Iterator[ToLogits]:
    """Logits of final hidden states as the model itself makes them, soft caps and scales included; no layer runs."""
    core = core_model(model)
    ids, given = torch.zeros(1, 1, dtype=torch.int64, device=core.device), list[Tensor]()

    def to_logits(final: Tensor) -> Tensor:
        given[:] = [final[None]]
        found: Tensor = core(input_ids=ids, use_cache=False).logits
        return found[0]

    with hooks.forward_by([hooks.decoder_stack(core)], lambda *_args, **_settings: _Ended(given[0])):
        yield to_logits


def require_head(model: Any, batch: Batch) -> None:
    """Check on one sequence that the final hidden states are all that logits are made from.

    Raises:
        InputError: they are not.
    """
    one = Batch(batch.ids[:1], batch.attention_mask[:1], batch.scored[:1], batch.numbers[:1])
    with torch.no_grad():
        wanted, final = logits(model, one)[0], final_states(model, one)[0]
        with head_alone(model) as to_logits:
            same = torch.equal(to_logits(final), wanted)
    if not same:
        raise InputError(
            f"{type(core_model(model)).__name__} does not make its logits from its final hidden states alone, as the "
            "computation of KL takes for granted. Use another architecture."
        )


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
    """Sum of KL over the positions of a batch that are not padding, with its graph.

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
    """The loss of a step."""
    return total / (batch.attention_mask.sum() if loss == "mean" else len(batch.ids))
