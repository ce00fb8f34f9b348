"""PEFT adapters: which kinds can be read at a hook point, and a base model with one inside, every tensor in use."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.models.loading import one_line_errors, require_none
from crosscoders.models.names import quiet_transformers

_ROUTED = ("XLORA", "POLY")
"""Kinds whose effect needs more than the modules: PEFT's own forward pass."""


def require_adapter(adapter: str, base: str) -> None:
    """Check an adapter by its configuration alone, and say so where it was trained on another model than `base`.

    Raises:
        InputError: no configuration; a kind that does not live in the model's modules, such as prompt tuning.
    """
    with quiet_transformers():
        import peft
    with one_line_errors(adapter):
        config = peft.PeftConfig.from_pretrained(adapter)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind in _ROUTED or getattr(config, "alora_invocation_tokens", None):
        raise InputError(
            f"adapter {adapter!r} is of the kind {kind}, which works on the model's input and not inside its modules, "
            "so its activations would be the base's. Give an adapter of weights, such as LoRA, or a whole model."
        )
    named = config.base_model_name_or_path
    if named and not _same_name(named, base):
        say(
            f"warning: adapter {adapter!r} says that it was trained on {named!r}, and the base is {base!r}; the tuned "
            "model is this base with that adapter."
        )


def _same_name(first: str, second: str) -> bool:
    """Return whether two names can be one model: the same folder, or the same last part of a path or hub id."""
    paths = [Path(name) for name in (first, second)]
    return paths[0].name == paths[1].name or (all(p.exists() for p in paths) and paths[0].samefile(paths[1]))


def with_adapter(model: Any, adapter: str) -> Any:
    """Return the model as a PEFT model with a saved adapter inside it, unmerged.

    An adapter that was saved with embeddings of more tokens replaces the model's; rows of tokens that the model does
    not have are left out again.

    Raises:
        InputError: weights that do not load; tensors that are missing or left over.
    """
    with quiet_transformers():
        import peft
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    with one_line_errors(adapter), quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
        stored = peft.load_peft_weights(adapter, device="cpu", key_mapping=mapping)
        n_ids, n_stored = len(model.get_input_embeddings().weight), _stored_rows(model, stored)
        if n_stored is not None and n_stored != n_ids:
            model.resize_token_embeddings(n_stored, mean_resizing=False)
        adapted: Any = peft.PeftModel.from_pretrained(model, adapter)
        report = adapted.load_adapter(adapter, "default", torch_device="cpu", key_mapping=mapping)
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        faults = {
            "that its configuration names are not in its file": sorted(set(expected) - set(stored)),
            "of its file are not in the model": sorted(report.unexpected_keys),
        }
        require_none(f"adapter {adapter!r} does not fit {type(model).__name__}", faults)
        embedding = model.get_input_embeddings()
        if n_stored is not None and n_stored > n_ids and isinstance(embedding, nn.Embedding):
            model.resize_token_embeddings(n_ids, mean_resizing=False)
    return adapted


def _stored_rows(model: Any, stored: dict[str, Any]) -> int | None:
    """Return the rows of the input embedding in an adapter's file, if it holds one."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    weight = stored.get(f"base_model.model.{name}.weight")
    return None if weight is None else len(weight)
