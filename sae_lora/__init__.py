"""LoRA around frozen dictionaries: splice an SAE into a model, fit LoRA to the unspliced model, measure what it closes.

Names are loaded when first used, so that importing the package costs nothing.
"""

from crosscoders.common.lazy import loader

TYPE_CHECKING = False  # for typing.TYPE_CHECKING, whose import is a third of a command's start
if TYPE_CHECKING:
    from sae_lora.dictionaries.controls import with_control
    from sae_lora.dictionaries.frozen import FrozenDictionary
    from sae_lora.dictionaries.loading import inspect_dictionary, load_dictionary
    from sae_lora.evaluation.cells import measure
    from sae_lora.fitting.correctors import load_corrector
    from sae_lora.fitting.loop import fit
    from sae_lora.fitting.settings import FitConfig
    from sae_lora.lora.adapter import load_adapter
    from sae_lora.splicing import special_ids, splice

_HOMES = {
    "FitConfig": "sae_lora.fitting.settings",
    "FrozenDictionary": "sae_lora.dictionaries.frozen",
    "fit": "sae_lora.fitting.loop",
    "inspect_dictionary": "sae_lora.dictionaries.loading",
    "load_adapter": "sae_lora.lora.adapter",
    "load_corrector": "sae_lora.fitting.correctors",
    "load_dictionary": "sae_lora.dictionaries.loading",
    "measure": "sae_lora.evaluation.cells",
    "special_ids": "sae_lora.splicing",
    "splice": "sae_lora.splicing",
    "with_control": "sae_lora.dictionaries.controls",
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
