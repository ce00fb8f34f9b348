"""LoRA around frozen dictionaries: splice an SAE into a model, fit LoRA to the unspliced model, measure what it closes.

Names are loaded when first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lora.dictionary import FrozenDictionary
    from sae_lora.loading import inspect_dictionary, load_dictionary
    from sae_lora.splicing import special_ids, splice

_HOMES = {
    "FrozenDictionary": "dictionary",
    "inspect_dictionary": "loading",
    "load_dictionary": "loading",
    "special_ids": "splicing",
    "splice": "splicing",
}

__all__ = [
    "FrozenDictionary",
    "inspect_dictionary",
    "load_dictionary",
    "special_ids",
    "splice",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
