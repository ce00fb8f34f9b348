"""A whole language model that can be entered at a hook point: lower layers once, upper layers for every patch.

`ResumableModel.run` reads a batch and keeps the activation at the hook point, `resume` runs what lies above it on
another activation, `logits` turns the residual after the last layer into logits with the model's own final norm and
unembedding. Layers below are bypassed, which is checked on a probe when the model is wrapped; an architecture in which
that gives other numbers (upper layers that read lower ones) is run from the bottom for every patch.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoders import hooks
from crosscoders.errors import InputError

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
