r"""How far a fine-tune moved the weights, and a placebo that moved as far.

    weight change = ||W - W_base|| / ||W_base||, norms over all parameters together, adapters merged

A placebo of the same steps and rate may move less than the tuned model, and then says too little of what so large a
change gives. `match_change_` scales its change: W_base + a (W - W_base), a = change of the tuned model / its own.
"""

from typing import Any

import torch

from crosscoders.common.errors import InputError
from crosscoders.models.adapters import with_adapter
from crosscoders.models.loading import load_model
from crosscoders.models.pair import inspect_pair


def weight_change(base: str, other: str, hook_point: str, tokenizer: str | None = None) -> float:
    """Return the weight change of a model or adapter from its base, on the CPU and in the dtype of the files."""
    adapter = inspect_pair(base, other, [hook_point], tokenizer=tokenizer).adapter
    model = load_model(base if adapter else other, "auto")
    if adapter:
        model = with_adapter(model, adapter).merge_and_unload()
    return change_between(load_model(base, "auto"), model)


@torch.no_grad()
def change_between(base: Any, model: Any) -> float:
    """Return the weight change between two loaded models of one architecture.

    Raises:
        InputError: a parameter of the base is missing or has another shape.
    """
    weights = dict(model.named_parameters())
    moved = size = 0.0
    for name, weight in base.named_parameters():
        if name not in weights or weights[name].shape != weight.shape:
            raise InputError(f"parameter {name!r} of the base has no counterpart, so the weight change is not defined.")
        moved += float((weights[name].double() - weight.double()).square().sum())
        size += float(weight.double().square().sum())
    return float((moved / size) ** 0.5)


@torch.no_grad()
def match_change_(model: Any, base: Any, change: float) -> float:
    """Scale the change of a model from its base to the given weight change in place, and return the factor.

    Raises:
        InputError: the model did not move.
    """
    own = change_between(base, model)
    if own == 0:
        raise InputError("the placebo did not move from the base, so its change cannot be scaled. Raise --placebo-lr.")
    weights = dict(model.named_parameters())
    for name, weight in base.named_parameters():
        weights[name].copy_(weight + change / own * (weights[name] - weight))
    return change / own
