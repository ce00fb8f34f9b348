"""The modules of a model without weights, on PyTorch's meta device, from its configuration alone."""

import functools
from typing import Any

import torch
from torch import nn

from crosscoders.common.errors import InputError
from crosscoders.models import names
from crosscoders.models.loading import auto_class, one_line_errors, read_config


def parameter_count(name: str, n_layers: int | None) -> int:
    """Count the parameters of a decoder, cut off above n_layers; None: the whole language model."""
    return sum(parameter.numel() for parameter in skeleton(name, n_layers).parameters())


def skeleton(name: str, n_layers: int | None = None) -> nn.Module:
    """Return the modules of a decoder without weights, cut off above n_layers; None: the whole language model.

    Raises:
        InputError: the configuration makes no such model.
    """
    config = read_config(name, n_layers)
    auto: Any = auto_class(config, with_head=n_layers is None)
    try:
        with torch.device("meta"), names.quiet_transformers():
            model: nn.Module = auto.from_config(config)
    except Exception as error:  # what a wrong value raises is as it may be
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"the configuration of {name!r} makes no model: {lines[0]} Check its config.json.") from error
    return model


@functools.cache
def bridge_names(name: str, n_layers: int) -> list[str]:
    """Return the hook points that a TransformerBridge has of a model's first layers."""
    from transformer_lens.model_bridge import TransformerBridge

    config = read_config(name, n_layers)
    with names.quiet_transformers(), one_line_errors(name):
        with torch.device("meta"):
            model = auto_class(config, with_head=True).from_config(config)
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model.eval(), tokenizer=names.load_auto(name, "tokenizer"), device="meta"
        )
    return list(bridge.hook_dict)
