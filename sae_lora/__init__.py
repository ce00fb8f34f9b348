"""LoRA around frozen dictionaries: splice an SAE into a model, fit LoRA to the unspliced model, measure what it closes.

Names are loaded when first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING

from crosscoders.lazy import loader

if TYPE_CHECKING:
    from sae_lora.adapter import load_adapter
    from sae_lora.config import FitConfig
    from sae_lora.controls import with_control
    from sae_lora.correctors import load_corrector
    from sae_lora.dictionary import FrozenDictionary
    from sae_lora.evaluation import measure
    from sae_lora.fitting import fit
    from sae_lora.loading import inspect_dictionary, load_dictionary
    from sae_lora.splicing import special_ids, splice

_HOMES = {
    "FitConfig": "config",
    "FrozenDictionary": "dictionary",
    "fit": "fitting",
    "inspect_dictionary": "loading",
    "load_adapter": "adapter",
    "load_corrector": "correctors",
    "load_dictionary": "loading",
    "measure": "evaluation",
    "special_ids": "splicing",
    "splice": "splicing",
    "with_control": "controls",
}

__all__ = [
    "FitConfig",
    "FrozenDictionary",
    "fit",
    "inspect_dictionary",
    "load_adapter",
    "load_corrector",
    "load_dictionary",
    "measure",
    "special_ids",
    "splice",
    "with_control",
]


__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
