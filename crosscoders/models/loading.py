"""A name -> a configuration that can be loaded, and weights of which every tensor is accounted for.

`read_config` reads and mends a configuration, `require_loadable` checks it before anything loads, `load_model` loads
a decoder, cut off above a layer, or a whole language model. transformers gives random values to tensors that a
checkpoint lacks, and leaves out those that it does not know; here both are an InputError.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import torch

from crosscoders.common.errors import CorruptData, EnvironmentFault, InputError
from crosscoders.common.progress import say
from crosscoders.models import hooks
from crosscoders.models.broken import require_json, require_tensors
from crosscoders.models.names import is_adapter, load_auto, quiet_transformers

_WRAPPERS = {r"^module\.": "", r"_orig_mod\.": ""}
"""What torch.nn.DataParallel and torch.compile put into names; without it the names are the model's own again."""
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|score|classifier|v_head|value_head)\.")
_NAMED = 3
"""Tensors that a message names."""


def require_whole(name: str, role: str = "model") -> None:
    """Raise InputError for a PEFT adapter where a whole model is needed."""
    if is_adapter(name):
        raise InputError(
            f"{role} {name!r} is a PEFT adapter, no whole model. Give the model that it was trained on, or merge the "
            "two first (peft's merge_and_unload)."
        )


def read_config(name: str, n_layers: int | None = None) -> Any:
    """Return a model's configuration, with `n_layers` layers of its language model; default: all.

    A wish for flash attention is dropped, which needs a GPU and a package of its own: attention is transformers'
    default for the architecture.
    """
    config = load_auto(name, "config")
    if str(getattr(config, "_attn_implementation", None)).startswith("flash"):
        config._attn_implementation = None
    if n_layers is not None:
        config.get_text_config().num_hidden_layers = n_layers
    return config


def require_loadable(name: str, config: Any) -> None:
    """Raise EnvironmentFault for quantised weights that cannot be read here."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        with quiet_transformers():
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantised), pre_quantized=True)
            quantizer.validate_environment(device_map=None)
    except Exception as error:  # each method raises what it likes, NameError included
        raise EnvironmentFault(
            f"model {name!r} is quantised, and its weights cannot be read here: {_reason(error)} Install what is "
            "missing, or give the model in full precision."
        ) from None


def auto_class(config: Any, *, with_head: bool) -> Any:
    """Return the class of transformers that makes the model; multimodal ones that know no causal class have another."""
    import transformers

    if not with_head:
        return transformers.AutoModel
    causal: Any = transformers.AutoModelForCausalLM
    return causal if type(config) in causal._model_mapping else transformers.AutoModelForImageTextToText


def load_model(
    name: str,
    dtype: torch.dtype | str,
    *,
    n_layers: int | None = None,
    with_head: bool = True,
    attention: str | None = None,
) -> Any:
    """Return a model with its weights, cut off above `n_layers` layers of its language model, with or without its head.

    attention: the implementation, default transformers' own choice.

    Raises:
        InputError: an adapter; weights that do not load; tensors that are missing, of another shape, or left over.
        EnvironmentFault: quantised weights that cannot be read here.
        CorruptData: a damaged file.
    """
    require_whole(name)
    config = read_config(name, n_layers)
    require_loadable(name, config)
    settings: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    settings |= {} if attention is None else {"attn_implementation": attention}
    load = auto_class(config, with_head=with_head).from_pretrained
    with one_line_errors(name), quiet_transformers():
        model, report = load(name, ignore_mismatched_sizes=True, **settings)
        if any(re.search(wrapper, key) for key in report["unexpected_keys"] for wrapper in _WRAPPERS):
            model, report = load(name, ignore_mismatched_sizes=True, key_mapping=_WRAPPERS, **settings)
            say(f"the weights of {name} are named as by a wrapper (_orig_mod. or module.); read without it")
    _require_all_tensors(name, model, report, n_layers, with_head)
    return model


def _require_all_tensors(name: str, model: Any, report: Any, n_layers: int | None, with_head: bool) -> None:
    layers = re.compile(rf"(?:^|\.){re.escape(hooks.name_of_layers(model))}\.(\d+)\.")

    def is_above(key: str) -> bool:
        """Return whether nothing that was loaded reads the tensor."""
        layer = layers.search(key)
        if layer is not None:
            return n_layers is not None and int(layer[1]) >= n_layers
        return not with_head and _HEAD.search(key) is not None

    faults = {
        "of the model are not in the checkpoint": sorted(report["missing_keys"]),
        "have another shape": sorted(key for key, *_ in report["mismatched_keys"]),
        "of the checkpoint are not in the model": sorted(key for key in report["unexpected_keys"] if not is_above(key)),
    }
    require_none(f"the weights of {name!r} do not fit {type(model).__name__}", faults)


def require_none(subject: str, faults: dict[str, list[str]]) -> None:
    """Raise InputError that names a few of the tensors of every fault, if there are any."""
    told = [
        f"{len(keys):,} tensors {what} ({', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''})"
        for what, keys in faults.items()
        if keys
    ]
    if told:
        raise InputError(
            f"{subject}: {'; '.join(told)}. They would be random or left out; save the model again under its own "
            "names, complete, or name its right architecture in config.json."
        )


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Raise what transformers, PEFT and safetensors raise while weights load as errors of ours."""
    from safetensors import SafetensorError

    try:
        yield
    except (InputError, EnvironmentFault, CorruptData, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise CorruptData(f"the weights of {name!r} are damaged ({error}). Download or copy them again.") from None
    except ImportError as error:
        raise EnvironmentFault(f"the weights of {name!r} need a package: {_reason(error)} Install it.") from error
    except Exception as error:  # what a damaged file raises is as it may be
        require_json(name)
        require_tensors(name, error)
        raise InputError(f"the weights of {name!r} do not load: {_reason(error)} Check the folder's files.") from error


def _reason(error: Exception) -> str:
    """Return the first line of an error that says something: PyTorch's first one ends with a colon."""
    if isinstance(error, KeyError):
        return f"there is no {error}."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return line if line.endswith((".", "!", "?")) else f"{line}."
