r"""Run the lower layers of a language model once, its upper layers for every change, and its head alone.

A pass starts at a point of the residual stream: what lies below hands on its input and costs nothing, and what stands
at the point is given (`start_at`). `find_prefix` checks on a batch that an architecture gives the same final hidden
states bit for bit that way; one in which it does not (upper layers that read lower ones) runs from the bottom.
`final_states` ends a pass before the head, `head_alone` makes logits of any final hidden states, and `require_head`
checks that these are all that logits are made from. `ResumableModel` puts the three together at any hook point;
`read_out` reads residual-stream vectors with the final norm and the head.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoders.common.errors import CorruptData, InputError
from crosscoders.models import hooks, points
from crosscoders.models.hooks import core_model
from crosscoders.models.points import first_layer_after
from crosscoders.text.padding import Batch, make_batch

ToLogits = Callable[[Tensor], Tensor]
"""Final hidden states of any positions, (positions, d_model) -> their logits, (positions, vocab)."""


def logits(model: Any, batch: Batch) -> Float[Tensor, "rows seq vocab"]:
    """Return the logits of one forward pass of the whole model."""
    out: Tensor = core_model(model)(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return out


class Prefix(NamedTuple):
    """A point of the residual stream at which passes of a model can start."""

    hook_point: str
    as_tuple: bool
    """Whether the layers of this architecture return a tuple, of which the activation is the first entry."""


def find_prefix(model: Any, hook_point: str, batch: Batch) -> Prefix | None:
    """Return the prefix up to a residual-stream point, if starting there gives the same final hidden states bit for
    bit."""
    kinds: list[bool] = []
    first = hooks.decoder_layers(core_model(model))[0]
    handle = first.register_forward_hook(lambda _m, _a, out: kinds.append(isinstance(out, tuple)))
    with torch.no_grad():
        try:
            whole = final_states(model, batch)
        finally:
            handle.remove()
        prefix = Prefix(hook_point, any(kinds))
        with start_at(model, prefix, activations(model, hook_point, batch)):
            resumed = final_states(model, batch)
    return prefix if torch.equal(whole, resumed) else None


def activations(model: Any, hook_point: str, batch: Batch) -> Float[Tensor, "rows seq d_model"]:
    """Return what stands at a residual-stream point; no layer above it runs."""
    x = hooks.run_to(core_model(model), [hook_point], batch.ids, batch.attention_mask)[hook_point]
    return x.clone()  # not an inference tensor: the backward pass may keep it


@contextlib.contextmanager
def start_at(model: Any, prefix: Prefix, x: Float[Tensor, "rows seq d_model"]) -> Iterator[None]:
    """Start the passes in the block at the hook point, with x there; the layers below cost nothing."""
    core, n_below = core_model(model), first_layer_after(prefix.hook_point)
    with hooks.bypass(core, n_below, as_tuple=prefix.as_tuple), hooks.replace(core, prefix.hook_point, lambda _: x):
        yield


def final_states(model: Any, batch: Batch) -> Float[Tensor, "rows seq d_model"]:
    """Return what the head reads, after the last norm, with its graph; the head runs on one position only."""
    finals: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, out: Any) -> Any:
        finals.append(out.last_hidden_state)
        out.last_hidden_state = out.last_hidden_state[:1, -1:]
        return out

    handle = hooks.decoder_stack(core_model(model)).register_forward_hook(cut)
    try:
        logits(model, batch)
    finally:
        handle.remove()
    return finals[0]


class _Ended:
    """What layers hand to a head: final hidden states, and None where it asks for anything else."""

    def __init__(self, final: Tensor) -> None:
        self.last_hidden_state = final

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == "last_hidden_state" else (self.last_hidden_state,)[index]

    def keys(self) -> list[str]:
        """Return the one key; multimodal models hand on what their language model gives as `**outputs`."""
        return ["last_hidden_state"]


@contextlib.contextmanager
def head_alone(model: Any) -> Iterator[ToLogits]:
    """Make logits of final hidden states as the model itself does, soft caps and scales included; no layer runs."""
    core = core_model(model)
    ids, finals = torch.zeros(1, 1, dtype=torch.int64, device=core.device), list[Tensor]()

    def to_logits(final: Tensor) -> Tensor:
        finals[:] = [final[None]]
        out: Tensor = core(input_ids=ids, use_cache=False).logits
        return out[0]

    with hooks.forward_by([hooks.decoder_stack(core)], lambda *_args, **_settings: _Ended(finals[0])):
        yield to_logits


def require_head(model: Any, batch: Batch) -> None:
    """Check on one sequence that the final hidden states are all that logits are made from.

    Raises:
        InputError: they are not.
        CorruptData: logits are not finite.
    """
    one = batch.take(torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        wanted, final = logits(model, one)[0], final_states(model, one)[0]
        with head_alone(model) as to_logits:
            same = torch.equal(to_logits(final), wanted)
    if not wanted.isfinite().all():
        raise CorruptData(
            f"the logits of {type(core_model(model)).__name__} are not finite: its weights hold NaN or infinity, or it "
            "overflows in this type. Download it again, or use --model-dtype float32."
        )
    if not same:
        raise InputError(
            f"{type(core_model(model)).__name__} does not make its logits from its final hidden states alone, as the "
            "computation of KL takes for granted. Use another architecture."
        )


class State(NamedTuple):
    """One batch after an unpatched forward pass."""

    batch: Batch
    activation: Float[Tensor, "rows seq width"]
    """At the hook point."""
    entry: Float[Tensor, "rows seq d_model"]
    """At the residual-stream point at or before it."""
    final: Float[Tensor, "rows seq d_model"]
    """What the head reads, after the last norm."""


class ResumableModel:
    """A whole model that is run once and then resumed at a hook point on other activations, without gradients.

    `model` is a Hugging Face language model, or a TransformerBridge for hook points off the residual stream.

    Raises:
        InputError: the model has no such hook point, no vector for each token there, or a head that reads more than
            final hidden states.
    """

    def __init__(self, model: nn.Module, hook_point: str) -> None:
        self.model, self.hook_point = model, hook_point
        self.entry_point = points.entry_point(hook_point)
        self.device = next(model.parameters()).device
        probe = _probe(self.device)
        self.run(probe)
        require_head(model, probe)
        self.prefix = find_prefix(model, self.entry_point, probe)
        """None: every resumed pass runs from the bottom."""

    @torch.inference_mode()
    def run(self, batch: Batch) -> State:
        """Return the state of a batch, from one unpatched pass."""
        with (
            hooks.capture(self.model, [self.hook_point]) as seen,
            hooks.capture(core_model(self.model), [self.entry_point]) as entered,
        ):
            final = final_states(self.model, batch)
        activation = hooks.at_tokens(seen, self.hook_point, batch.ids)
        return State(batch, activation, hooks.at_tokens(entered, self.entry_point, batch.ids), final)

    @torch.inference_mode()
    def resume(self, state: State, activation: Float[Tensor, "rows seq width"]) -> Float[Tensor, "rows seq d_model"]:
        """Return what the head reads with `activation` at the hook point."""
        return self.resume_with_graph(state, activation)

    def resume_with_graph(
        self, state: State, activation: Float[Tensor, "rows seq width"]
    ) -> Float[Tensor, "rows seq d_model"]:
        """Return what `resume` returns, with its graph; for gradients no tensor of the state may be of inference."""
        activation = activation.to(state.activation.dtype)
        with contextlib.ExitStack() as stack:
            if self.prefix is not None:
                stack.enter_context(start_at(self.model, self.prefix, state.entry))
            stack.enter_context(hooks.replace(self.model, self.hook_point, activation.reshape_as))
            return final_states(self.model, state.batch)

    @torch.inference_mode()
    def logits(self, final: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocab"]:
        """Return the logits of final hidden states."""
        with head_alone(self.model) as to_logits:
            return to_logits(final)


@torch.inference_mode()
def read_out(model: Any, x: Float[Tensor, "vectors d_model"]) -> Float[Tensor, "vectors vocab"]:
    """Return the logits of residual-stream vectors after the last layer, each as a sequence of its own.

    Raises:
        InputError: the head of this architecture cannot be run without the layers.
    """
    layers = hooks.decoder_layers(core_model(model))
    prefix = find_prefix(model, f"blocks.{len(layers) - 1}.hook_resid_post", _probe(x.device))
    if prefix is None:
        raise InputError(
            f"{type(core_model(model)).__name__} gives other logits when its layers are bypassed; not supported."
        )
    with start_at(model, prefix, x[:, None]):
        return logits(model, _probe(x.device, len(x), 1))[:, 0]


def _probe(device: torch.device, n_rows: int = 1, length: int = 8) -> Batch:
    """Return tokens that every vocabulary has."""
    ids = [np.arange(1, length + 1)] * n_rows
    return make_batch(ids, [np.ones(length, dtype=bool)] * n_rows, np.arange(n_rows), 0).to(device)
