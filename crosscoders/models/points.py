"""The name of a hook point -> its layer, order and width, and whether a model has it, from its configuration alone.

Names are TransformerLens's. `blocks.L.hook_resid_post` and `blocks.L.hook_resid_pre` work on a Hugging Face decoder
(the fast path), so do `hook_attn_out`, `hook_mlp_out`, `attn.hook_z` and `mlp.hook_in` where `PARTS` knows the
architecture; every other name needs a TransformerBridge.
"""

import re
from typing import Any

from crosscoders.common.errors import InputError, nearest

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_RUNNABLE = re.compile(r"blocks\.\d+\.(\w+\.)?hook_\w+")
_LAYER = re.compile(
    r"(?:(?:model\.)?(?:language_model\.)?(?:model\.)?(?:decoder\.)?layers|gpt_neox\.layers|(?:transformer\.)?h"
    r"|transformer\.blocks)\.(\d+)(?:\.([\w.]+))?"
)
"""A decoder layer as transformers names it, and a module in it."""
_RESIDUALS = ("hook_resid_pre", "hook_resid_post")
_ORDER = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "mlp.hook_in", "hook_mlp_out", "hook_resid_post")
INPUTS = ("attn.hook_z", "mlp.hook_in")
"""Hook points that are what a module reads; the others are what it puts out."""
_NORMED = {"attn.hook_z": "self_attn.o_proj", "hook_attn_out": "post_attention_layernorm",
           "mlp.hook_in": "mlp", "hook_mlp_out": "post_feedforward_layernorm"}  # fmt: skip
_PLAIN = {"attn.hook_z": "self_attn.o_proj", "hook_attn_out": "self_attn", "mlp.hook_in": "mlp", "hook_mlp_out": "mlp"}
PARTS = {
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
"""Architecture -> hook point -> module of a layer, whose input is meant by `INPUTS`, whose output by the others.

The output is what is added to the residual stream, so after the norms that Gemma-2 and its like put behind attention
and MLP. Tests hold each equal to the TransformerBridge; other architectures (some scale these outputs) need the bridge.
"""


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
    architecture, what a module inside it puts out (`model.layers.8.mlp`) only where `PARTS` says so for `model_type`.
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
    kinds = (kind for kind, module in PARTS.get(str(model_type), {}).items() if module == part)
    return next((f"blocks.{layer}.{kind}" for kind in kinds if (kind in INPUTS) == is_input), None)


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


def plain_kinds(model_type: str | None) -> list[str]:
    """Return the hook points of a layer that an architecture has without a TransformerBridge."""
    return [*_RESIDUALS, *PARTS.get(str(model_type), {})]


def require_layer(hook_point: str, n_layers: int, model_name: str, model_type: str | None = None) -> None:
    """Raise InputError, with the nearest name, when the name has no layer or the model has no such layer."""
    if _BLOCK.match(hook_point) is None:
        near = nearest_point(hook_point, plain_kinds(model_type), n_layers, model_type)
        raise InputError(f"hook_point {hook_point!r} has no layer{near}")
    if layer_of(hook_point) >= n_layers:
        raise InputError(
            f"hook_point {hook_point!r} is not in {model_name!r}: it has layers 0 to {n_layers - 1}. "
            f"Use 'blocks.{n_layers // 2}.hook_resid_post' for the middle layer."
        )


def require_named(hook_point: str, named: list[str]) -> None:
    """Raise InputError, with the nearest name, unless a TransformerBridge names the hook point."""
    if hook_point in named:
        return
    layer = layer_of(hook_point)
    kinds = [name.removeprefix(f"blocks.{layer}.") for name in named if name.startswith(f"blocks.{layer}.")]
    raise InputError(f"hook_point {hook_point!r} is not in this model{nearest_point(hook_point, kinds, layer + 1)}")


def nearest_point(name: str, kinds: list[str], n_layers: int, model_type: str | None = None) -> str:
    """Return the end of a sentence that names the hook point that was most likely meant, of a layer with `kinds`."""
    number = re.search(r"\d+", name)
    layer = number[0] if number and int(number[0]) < n_layers else str(n_layers // 2)
    meant = f"blocks.{name}.hook_resid_post" if name.isdecimal() else known_as(name, model_type) or name
    choices = [f"blocks.{layer}.{kind}" for kind in kinds]
    near = nearest(meant, choices)
    return near if near != "." else f". Use a name such as 'blocks.{layer}.hook_resid_post'."


def first_layer_after(hook_point: str) -> int:
    """Return the first layer that reads what stands at the hook point."""
    return layer_of(hook_point) + (not hook_point.endswith("hook_resid_pre"))
