"""Crosscoders: one sparse dictionary over the activations of a base and a tuned language model.

Names are loaded when first used, so that importing the package costs nothing.
"""

from crosscoders.common.lazy import loader

TYPE_CHECKING = False  # for typing.TYPE_CHECKING, whose import is a third of a command's start
if TYPE_CHECKING:
    from crosscoders.activations.cache import ActivationCache
    from crosscoders.activations.caching import cache_activations, run_cache
    from crosscoders.activations.settings import CacheConfig
    from crosscoders.activations.source import open_source
    from crosscoders.activations.stream import cached_stream, live_stream, tensor_stream
    from crosscoders.common.errors import CorruptData, EnvironmentFault, InputError
    from crosscoders.dictionary.crosscoder import Crosscoder
    from crosscoders.dictionary.metrics import evaluate
    from crosscoders.dictionary.settings import CrosscoderConfig
    from crosscoders.formats.load import load_crosscoder
    from crosscoders.models.pair import ModelPair, load_pair
    from crosscoders.text.settings import DataConfig, DataSource
    from crosscoders.training.loop import train
    from crosscoders.training.settings import TrainConfig

_HOMES = {
    "ActivationCache": "crosscoders.activations.cache",
    "CacheConfig": "crosscoders.activations.settings",
    "CorruptData": "crosscoders.common.errors",
    "Crosscoder": "crosscoders.dictionary.crosscoder",
    "CrosscoderConfig": "crosscoders.dictionary.settings",
    "DataConfig": "crosscoders.text.settings",
    "DataSource": "crosscoders.text.settings",
    "EnvironmentFault": "crosscoders.common.errors",
    "InputError": "crosscoders.common.errors",
    "ModelPair": "crosscoders.models.pair",
    "TrainConfig": "crosscoders.training.settings",
    "cache_activations": "crosscoders.activations.caching",
    "cached_stream": "crosscoders.activations.stream",
    "evaluate": "crosscoders.dictionary.metrics",
    "live_stream": "crosscoders.activations.stream",
    "load_crosscoder": "crosscoders.formats.load",
    "load_pair": "crosscoders.models.pair",
    "open_source": "crosscoders.activations.source",
    "run_cache": "crosscoders.activations.caching",
    "tensor_stream": "crosscoders.activations.stream",
    "train": "crosscoders.training.loop",
}

__all__ = [
    "ActivationCache",
    "CacheConfig",
    "CorruptData",
    "Crosscoder",
    "CrosscoderConfig",
    "DataConfig",
    "DataSource",
    "EnvironmentFault",
    "InputError",
    "ModelPair",
    "TrainConfig",
    "cache_activations",
    "cached_stream",
    "evaluate",
    "live_stream",
    "load_crosscoder",
    "load_pair",
    "open_source",
    "run_cache",
    "tensor_stream",
    "train",
]


__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
