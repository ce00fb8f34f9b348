"""sparsify: a folder named like the module that it was trained on (`layers.3.mlp`), `cfg.json` and `sae.safetensors`.

Top-k SAEs, and transcoders with or without a skip, which read the module's input and reconstruct its output.
"""

import re
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.models import points
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, Sae
from sae_lora.dictionaries.places import chosen_hook_point
from sae_lora.dictionaries.tensors import Shape, float_tensors, require_shapes, shapes_of, vector_length


def inspect(path: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    """Return what headers and settings say of a folder or its weights file."""
    weights = _weights(path)
    folder = weights.parent
    config = files.read_model(folder / "cfg.json", Record)
    activation, k = config.get("activation") or "topk", config.get("k")
    if activation != "topk" or config.get("signed"):
        signed = "signed " if config.get("signed") else ""
        raise InputError(f"{str(path)!r} has activation {signed}{activation}; topk is read.")
    if not isinstance(k, int) or k < 1:
        raise InputError(f"{str(path)!r} has k {k!r} in its cfg.json; expected a whole number.")
    shapes = shapes_of(weights)
    d_model, dict_size = vector_length(weights, shapes, "b_dec"), vector_length(weights, shapes, "encoder.bias")
    expected: dict[str, Shape] = {"encoder.weight": (dict_size, d_model), "W_dec": (dict_size, d_model)}
    if config.get("skip_connection"):
        expected["W_skip"] = (d_model, d_model)
    require_shapes(weights, shapes, expected, "its biases")
    name = folder.absolute().name
    module = name if re.search(r"\.\d+", name) else None
    transcodes = config.get("transcode") is True
    return DictionaryInfo(
        layout="sparsify",
        path=str(path),
        hook_point=chosen_hook_point(module and module + ".input" * transcodes, hook_point, path, model_type),
        d_model=d_model,
        dict_size=dict_size,
        settings={"gate": "topk", "k": k, "apply_b_dec_to_input": not transcodes},
        model_names=_model_names(folder.absolute().parent / "config.json"),
        writes=(module and points.known_as(module, model_type)) or name if transcodes else None,
    )


def read(info: DictionaryInfo, path: Path) -> FrozenDictionary:
    """Read the weights of an inspected dictionary."""
    tensors = float_tensors(_weights(path))
    ours = {"W_enc": tensors["encoder.weight"].T.contiguous(), "b_enc": tensors["encoder.bias"]}
    if "W_skip" in tensors:
        ours["W_skip"] = tensors["W_skip"].T.contiguous()
    return Sae(info, {**ours, "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]})


def _weights(path: Path) -> Path:
    return path / "sae.safetensors" if path.is_dir() else path


def _model_names(config: Path) -> tuple[str, ...]:
    """Return what the settings of the whole run, one folder up, say."""
    name: Any = files.read_model(config, Record).get("model") if config.is_file() else None
    return (name,) if isinstance(name, str) else ()
