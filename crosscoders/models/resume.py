"""A whole language model that can be entered at a hook point: lower layers once, upper layers for every patch.

`ResumableModel.run` reads a batch and keeps the activation at the hook point, `resume` runs what lies above it on
another activation, `logits` turns the residual after the last layer into logits with the model's own final norm and
unembedding. Layers below are bypassed, which is checked on a probe when the model is wrapped; an architecture in which
that gives other numbers (upper layers that read lower ones) is run from the bottom for every patch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoders.common.errors import InputError
from crosscoders.models import hooks
from crosscoders.models.hooks import core_model, first_layer_after
from crosscoders.text.tokens import Batch

_PROBE_TOKENS = 8


class State(NamedTuple):
    """One batch after an unpatched forward pass."""

    ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    activation: Float[Tensor, "rows seq d_model"]
    """At the hook point."""
    entry: Float[Tensor, "rows seq width"] | None
    """What goes into the layer of the hook point, where that is no residual-stream point."""
    final: Float[Tensor, "rows seq width"]
    """Residual stream after the last layer."""


class ResumableModel:
    """`model` is a Hugging Face language model, or a TransformerBridge for hook points off the residual stream.

    Raises:
        InputError: the model has no such hook point, or no decoder layers that can be bypassed.
    """

    def __init__(self, model: nn.Module, hook_point: str) -> None:
        self.owner: Any = model
        self.core: Any = getattr(model, "original_model", model)
        self.hook_point = hook_point
        layer, n_layers = hooks.layer_of(hook_point), len(hooks.decoder_layers(self.core))
        hooks.require_layer(hook_point, n_layers, type(self.core).__name__)
        self.n_layers = n_layers
        self.last = f"blocks.{n_layers - 1}.hook_resid_post"
        self.entry = None if hooks.is_residual(hook_point) else f"blocks.{layer}.hook_resid_pre"
        self.n_below = layer + hook_point.endswith(".hook_resid_post")
        self.as_tuple = False
        self.can_skip = True
        self._probe()

    @property
    def device(self) -> torch.device:
        return next(self.core.parameters()).device

    @torch.inference_mode()
    def _probe(self) -> None:
        """Find out whether layers return tuples and whether bypassing them is exact for this architecture."""
        ids = torch.arange(1, 1 + _PROBE_TOKENS, device=self.device)[None]
        kinds: list[bool] = []
        handle = hooks.decoder_layers(self.core)[-1].register_forward_hook(
            lambda _module, _args, out: kinds.append(not isinstance(out, Tensor))
        )
        try:
            logits = self.core(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        finally:
            handle.remove()
        self.as_tuple = kinds[0]
        state = self.run(ids, torch.ones_like(ids))
        if not _close(self.logits(state.final[0]), logits):
            raise InputError(
                f"{type(self.core).__name__} gives other logits when its layers are bypassed; not supported."
            )
        self.can_skip = _close(self.resume(state, state.activation), state.final)

    @torch.inference_mode()
    def run(self, ids: Int[Tensor, "rows seq"], attention_mask: Int[Tensor, "rows seq"]) -> State:
        """The unpatched forward pass."""
        wanted = [self.last] if self.entry is None else [self.entry, self.last]
        with hooks.capture(self.owner, [self.hook_point]) as seen:
            found = hooks.run_to(self.core, wanted, ids, attention_mask)
        entry = None if self.entry is None else found[self.entry]
        activation = hooks.at_tokens(seen, self.hook_point, ids)
        return State(ids, attention_mask, activation, entry, found[self.last])

    @torch.inference_mode()
    def resume(self, state: State, activation: Float[Tensor, "rows seq d_model"]) -> Float[Tensor, "rows seq width"]:
        """Residual stream after the last layer, with `activation` at the hook point."""
        activation, entry = activation.to(state.activation.dtype), state.entry
        with contextlib.ExitStack() as stack:
            if self.can_skip:
                stack.enter_context(hooks.bypass(self.core, self.n_below, as_tuple=self.as_tuple))
                if self.entry is not None and entry is not None:
                    stack.enter_context(hooks.replace(self.core, self.entry, lambda _: entry))
            stack.enter_context(hooks.replace(self.owner, self.hook_point, activation.reshape_as))
            return hooks.run_to(self.core, [self.last], state.ids, state.attention_mask)[self.last]

    @torch.inference_mode()
    def logits(self, final: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of residual-stream vectors after the last layer, each as a row of its own."""
        ids = torch.zeros(len(final), 1, dtype=torch.int64, device=self.device)
        with (
            hooks.bypass(self.core, self.n_layers, as_tuple=self.as_tuple),
            hooks.replace(self.core, self.last, lambda _: final[:, None]),
        ):
            found: Tensor = self.core(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return found[:, 0]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding of the model's type; a wrong route differs by the size of the numbers themselves."""
    tolerance = 1e-4 if b.dtype == torch.float32 else 0.05
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


ToLogits = Callable[[Tensor], Tensor]
"""Final hidden states of any positions, (positions, d_model) -> their logits, (positions, vocab)."""


def logits(model: Any, batch: Batch) -> Float[Tensor, "rows seq vocab"]:
    """One forward pass of the whole model."""
    found: Tensor = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return found


class Prefix(NamedTuple):
    """Where teacher and student part, as LoRA is on later layers only."""

    hook_point: str
    as_tuple: bool
    """Whether the layers of this architecture return a tuple, of which the activation is the first entry."""


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


class _Ended:
    """What layers hand to a head: final hidden states, and None where it asks for anything else."""

    def __init__(self, final: Tensor) -> None:
        self.last_hidden_state = final

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == "last_hidden_state" else (self.last_hidden_state,)[index]

    def keys(self) -> list[str]:
        """Multimodal models hand on what their language model gives as `**outputs`."""
        return ["last_hidden_state"]


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
