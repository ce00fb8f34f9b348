"""Hook point name -> module; read and replace activations there, hooks always removed.

`points` says what the names mean. `capture` reads, `replace` edits, `bypass` leaves layers out; all are context
managers, so they nest and survive exceptions.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosscoders.common.errors import InputError
from crosscoders.models import points


class _Reached(Exception):
    """Raised by `capture(stop=True)` once every hook point has been seen; never leaves this module."""


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
        points.require_named(hook_point, list(named))
        return named[hook_point], False
    layers, layer, config = decoder_layers(model), points.layer_of(hook_point), getattr(model, "config", None)
    points.require_layer(hook_point, len(layers), type(model).__name__)
    kind = hook_point.removeprefix(f"blocks.{layer}.")
    if points.is_residual(hook_point):
        return layers[layer], kind == "hook_resid_pre"
    model_type = getattr(config.get_text_config(), "model_type", None) if config is not None else None
    module = points.PARTS.get(str(model_type), {}).get(kind)
    if module is None:
        kinds = points.plain_kinds(model_type)
        near = points.nearest_point(hook_point, kinds, len(layers), model_type).removesuffix(".")
        raise InputError(
            f"hook_point {hook_point!r} needs a TransformerBridge; {type(model).__name__} has {', '.join(kinds)} "
            f"without one{near}"
        )
    return layers[layer].get_submodule(module), kind in points.INPUTS


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


def core_model(model: Any) -> Any:
    """Return the Hugging Face model inside a PEFT model or a TransformerBridge: every forward pass, also of `generate`,
    calls it with the ids and the mask."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(model, "original_model", model)
