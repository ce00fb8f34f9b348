"""Hook point name -> module; read and replace activations there, hooks always removed.

Names are TransformerLens's. `blocks.L.hook_resid_post` and `blocks.L.hook_resid_pre` work on a Hugging Face decoder
(the fast path), so do `hook_attn_out`, `hook_mlp_out`, `attn.hook_z` and `mlp.hook_in` where `_PARTS` knows the
architecture; every other name needs a TransformerBridge. `capture` reads, `replace` edits, `bypass` leaves layers out;
all are context managers, so they nest and survive exceptions.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosscoders.common.errors import InputError
from crosscoders.models import hooks

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_RUNNABLE = re.compile(r"blocks\.\d+\.(\w+\.)?hook_\w+")
_LAYER = re.compile(
    r"(?:(?:model\.)?(?:language_model\.)?(?:model\.)?(?:decoder\.)?layers|gpt_neox\.layers|(?:transformer\.)?h"
    r"|transformer\.blocks)\.(\d+)(?:\.([\w.]+))?"
)
"""A decoder layer as transformers names it, and a module in it."""
_ORDER = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "mlp.hook_in", "hook_mlp_out", "hook_resid_post")
_INPUTS = ("attn.hook_z", "mlp.hook_in")
"""Hook points that are what a module reads; the others are what it puts out."""
_NORMED = {"attn.hook_z": "self_attn.o_proj", "hook_attn_out": "post_attention_layernorm",
           "mlp.hook_in": "mlp", "hook_mlp_out": "post_feedforward_layernorm"}  # fmt: skip
_PLAIN = {"attn.hook_z": "self_attn.o_proj", "hook_attn_out": "self_attn", "mlp.hook_in": "mlp", "hook_mlp_out": "mlp"}
_PARTS = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _NORMED),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _PLAIN),
    "gpt2": {"attn.hook_z": "attn.c_proj", "hook_attn_out": "attn", "mlp.hook_in": "mlp", "hook_mlp_out": "mlp"},
    "gpt_neox": {
        "attn.hook_z": "attention.dense",
        "hook_attn_out": "attention",
        "mlp.hook_in": "mlp",
        "hook_mlp_out": "mlp",
    },
}
"""Architecture -> hook point -> module of a layer, whose input is meant by `_INPUTS`, whose output by the others.

The output is what is added to the residual stream, so after the norms that Gemma-2 and its like put behind attention
and MLP. Tests hold each equal to the TransformerBridge; other architectures (some scale these outputs) need the bridge.
"""


class _Reached(Exception):
    """Raised by `capture(stop=True)` once every hook point has been seen; never leaves this module."""


def is_residual(hook_point: str) -> bool:
    """Say whether the hook point has the fast path."""
    return _RESIDUAL.fullmatch(hook_point) is not None


def layer_of(hook_point: str) -> int:
    """Return the layer of a hook point.

    Raises:
        InputError: the name has no layer.
    """
    match = _BLOCK.match(hook_point)
    if match is None:
        raise InputError(f"hook_point {hook_point!r} has no layer. Use a name such as 'blocks.13.hook_resid_post'.")
    return int(match[1])


def known_as(name: str, model_type: str | None = None) -> str | None:
    """Return the hook point that a name means: its own, or that of a module of transformers; None where it means none.

    A decoder layer's output and input (`model.layers.8`, `gpt_neox.layers.3.input`) are hook points in every
    architecture, what a module inside it puts out (`model.layers.8.mlp`) only where `_PARTS` says so for `model_type`.
    """
    if _RUNNABLE.fullmatch(name):
        return name
    match = _LAYER.fullmatch(name.removesuffix(".output").removesuffix(".input"))
    if match is None:
        return None
    layer, part, is_input = match[1], match[2], name.endswith(".input")
    if part is None:
        return f"blocks.{layer}.hook_resid_{'pre' if is_input else 'post'}"
    if part == "pre_feedforward_layernorm" and model_type in ("gemma2", "gemma3_text"):
        part, is_input = "mlp", not is_input
    kinds = (kind for kind, module in _PARTS.get(str(model_type), {}).items() if module == part)
    return next((f"blocks.{layer}.{kind}" for kind in kinds if (kind in _INPUTS) == is_input), None)


def place(hook_point: str) -> tuple[int, int]:
    """Return what sorts hook points in the order in which a forward pass of a sequential architecture reaches them."""
    layer = layer_of(hook_point)
    kind = hook_point.removeprefix(f"blocks.{layer}.")
    return layer, _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def entry_point(hook_point: str) -> str:
    """Return the residual-stream point at or before a hook point, from which on a forward pass can be repeated."""
    return hook_point if is_residual(hook_point) else f"blocks.{layer_of(hook_point)}.hook_resid_pre"


def width(config: Any, hook_point: str) -> int:
    """Return the width of the activations at a hook point, from a text configuration."""
    if not hook_point.endswith(".attn.hook_z"):
        return int(config.hidden_size)
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def require_layer(hook_point: str, n_layers: int, model_name: str) -> None:
    """Raise InputError when the model has no such layer."""
    if layer_of(hook_point) >= n_layers:
        raise InputError(
            f"hook_point {hook_point!r} is not in {model_name!r}: it has layers 0 to {n_layers - 1}. "
            f"Use 'blocks.{n_layers // 2}.hook_resid_post' for the middle layer."
        )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a Hugging Face model, also under PEFT or a language-model head; in a
    multimodal model those of the language model, never of a vision tower."""
    for name, module in language_model(model).named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] in ("layers", "h", "blocks"):
            return module
    raise InputError(f"no list of decoder layers in {type(model).__name__}. Use a decoder-only language model.")


def language_model(model: Any) -> nn.Module:
    """Return the part of a model that reads tokens, where it says which; else the model itself."""
    decoder = getattr(model, "get_decoder", None)
    text_model: nn.Module = model if decoder is None else decoder()
    return text_model


def name_of_layers(model: nn.Module) -> str:
    """Return the name of the list of decoder layers inside the model."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers)


def decoder_stack(model: nn.Module) -> nn.Module:
    """Return the module that runs the decoder layers, one after the other, and the last norm."""
    layers = decoder_layers(model)
    return next(module for module in model.modules() if any(child is layers for child in module.children()))


def find_module(model: Any, hook_point: str) -> tuple[nn.Module, bool]:
    """Return the module of a hook point, and whether its input (True) or its output is meant.

    Raises:
        InputError: the model has no such hook point.
    """
    named = getattr(model, "hook_dict", None)  # a TransformerBridge names its own hook points
    if named is not None:
        if hook_point in named:
            return named[hook_point], False
        raise InputError(f"hook_point {hook_point!r} is not in this model. It has, for example, {sorted(named)[:3]}.")
    layers, layer = decoder_layers(model), layer_of(hook_point)
    require_layer(hook_point, len(layers), type(model).__name__)
    match = _RESIDUAL.fullmatch(hook_point)
    if match is not None:
        return layers[layer], match[2] == "pre"
    config = getattr(model, "config", None)
    kind = getattr(config.get_text_config(), "model_type", None) if config is not None else None
    name = _PARTS.get(str(kind), {}).get(hook_point.removeprefix(f"blocks.{layer}."))
    if name is None:
        also = f", {', '.join(_PARTS[kind])}" if kind in _PARTS else ""
        raise InputError(
            f"hook_point {hook_point!r} needs a TransformerBridge; {type(model).__name__} has hook_resid_pre, "
            f"hook_resid_post{also} without one."
        )
    return layers[layer].get_submodule(name), hook_point.removeprefix(f"blocks.{layer}.") in _INPUTS


def _as_tensor(value: Any) -> Tensor:
    """Return what a decoder layer computes: a tensor (transformers 5) or the first entry of a tuple."""
    return value if isinstance(value, Tensor) else value[0]


@contextlib.contextmanager
def capture(model: Any, hook_points: list[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect activations of one or several hook points while the model runs.

    With `stop`, the forward pass ends as soon as all have been seen; call the model through `run_to` then.
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, value: Any) -> None:
        seen[name] = _as_tensor(value)
        if stop and len(seen) == len(hook_points):
            raise _Reached

    try:
        for name in hook_points:
            module, is_input = find_module(model, name)
            if is_input:
                handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args[0])))
            else:
                handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: keep(name, out)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_to(model: Any, hook_points: list[str], input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return the activations at the hook points, (rows, seq, d_model) each; nothing above the deepest one is
    computed."""
    with capture(model, hook_points, stop=True) as seen, contextlib.suppress(_Reached), torch.inference_mode():
        if hasattr(model, "hook_dict"):
            model(input_ids, attention_mask=attention_mask, return_type=None)
        else:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return {name: at_tokens(seen, name, input_ids) for name in hook_points}


def at_tokens(seen: dict[str, Tensor], hook_point: str, input_ids: Tensor) -> Tensor:
    """Return a captured activation as (rows, seq, width); some architectures hold all tokens of a batch in one axis.

    Raises:
        InputError: nothing was captured, or not one vector for each token.
    """
    if hook_point not in seen:
        raise InputError(f"hook_point {hook_point!r} did not fire in the forward pass. Use another one.")
    activation, shape = seen[hook_point], input_ids.shape
    if activation.ndim == 2 and len(activation) == input_ids.numel():
        return activation.view(*shape, -1)
    if activation.ndim != 3 or activation.shape[:2] != shape:
        raise InputError(
            f"hook_point {hook_point!r} has activations of shape {tuple(activation.shape)} for tokens of shape "
            f"{tuple(shape)}; expected one vector for each token. Use a hook point such as hook_resid_post."
        )
    return activation


@contextlib.contextmanager
def replace(model: Any, hook_point: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put `edit(activation)` in place of the activation at a hook point; tuple outputs keep their other entries."""
    module, is_input = find_module(model, hook_point)

    def edit_output(_module: nn.Module, _args: Any, out: Any) -> Any:
        return edit(out) if isinstance(out, Tensor) else (edit(out[0]), *out[1:])

    def edit_input(_module: nn.Module, args: Any) -> Any:
        return (edit(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(edit_input) if is_input else module.register_forward_hook(edit_output)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def bypass(model: Any, n_layers: int, *, as_tuple: bool = False) -> Iterator[None]:
    """Let the first `n_layers` decoder layers hand on their input, so that they cost nothing; hooks on them still run.

    `as_tuple`: the layers of this architecture return a tuple, of which the activation is the first entry.
    """

    def hand_on(hidden_states: Tensor, *_args: Any, **_settings: Any) -> Any:
        return (hidden_states,) if as_tuple else hidden_states

    with forward_by(list(decoder_layers(model))[:n_layers], hand_on):
        yield


@contextlib.contextmanager
def forward_by(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let modules compute with another function; what other libraries put in its place comes back at the end."""
    # vars(), because a TransformerBridge hands attributes that are set on a layer to the module that it wraps.
    attributes = [vars(module) for module in modules]
    befores = [own.get("forward") for own in attributes]
    try:
        for own in attributes:
            own["forward"] = forward
        yield
    finally:
        for own, before in zip(attributes, befores, strict=True):
            del own["forward"]
            if before is not None:
                own["forward"] = before


def first_layer_after(hook_point: str) -> int:
    """Return the first layer that reads what stands at the hook point."""
    return hooks.layer_of(hook_point) + (not hook_point.endswith("hook_resid_pre"))


def core_model(model: Any) -> Any:
    """Return the Hugging Face model inside a PEFT model or a TransformerBridge: every forward pass, also of `generate`,
    calls it with the ids and the mask."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(model, "original_model", model)
