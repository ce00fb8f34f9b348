"""Crosscoders: one sparse dictionary over the activations of a base and a tuned language model.

Names are loaded when first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING

from crosscoders.lazy import loader

if TYPE_CHECKING:
    from crosscoders.cache import ActivationCache
    from crosscoders.caching import cache_activations, run_cache
    from crosscoders.config import CacheConfig, CrosscoderConfig, DataSource, TrainConfig
    from crosscoders.errors import CorruptData, EnvironmentFault, InputError
    from crosscoders.formats import load_crosscoder
    from crosscoders.metrics import evaluate
    from crosscoders.model import Crosscoder
    from crosscoders.pair import ModelPair, load_pair
    from crosscoders.source import open_source
    from crosscoders.stream import cached_stream, live_stream, tensor_stream
    from crosscoders.training import train

_HOMES = {
    "ActivationCache": "cache",
    "CacheConfig": "config",
    "CorruptData": "errors",
    "Crosscoder": "model",
    "CrosscoderConfig": "config",
    "DataSource": "config",
    "EnvironmentFault": "errors",
    "InputError": "errors",
    "ModelPair": "pair",
    "TrainConfig": "config",
    "cache_activations": "caching",
    "cached_stream": "stream",
    "evaluate": "metrics",
    "live_stream": "stream",
    "load_crosscoder": "formats",
    "load_pair": "pair",
    "open_source": "source",
    "run_cache": "caching",
    "tensor_stream": "stream",
    "train": "training",
}

__all__ = [
    "ActivationCache",
    "CacheConfig",
    "CorruptData",
    "Crosscoder",
    "CrosscoderConfig",
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
