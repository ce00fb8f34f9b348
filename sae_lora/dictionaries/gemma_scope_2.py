"""Gemma Scope 2: `params.safetensors` with `config.json`, or without it where the folder's path tells the place.

SAEs, and transcoders with or without an affine skip, which read `mlp.hook_in` and reconstruct `hook_mlp_out`. The
crosscoder over layers is `crosscoders.formats.gemma_scope_2`'s.
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

MODEL_TYPE = "gemma3_text"
"""Architecture of the only models that it was published for, which decides what its names of places mean."""
_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
_SITES = {
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
    "transcoder": "mlp.hook_in",
}
"""Folder of a repository, but for an ending `_all` -> where the dictionaries in it read."""


def inspect(path: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    """Return what headers and settings say of a folder or its weights file."""
    folder, weights = _files(path)
    config = _settings(folder)
    kind = config.get("type") or ("transcoder" if "hf_hook_point_out" in config else "sae")
    if kind not in ("sae", "transcoder"):
        raise InputError(
            f"{str(path)!r} is a {kind} of Gemma Scope 2; its SAEs and transcoders are read here, its crosscoders as "
            "whole folders with params_layer_0.safetensors."
        )
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise InputError(f"{str(path)!r} has architecture {config['architecture']!r}; Gemma Scope 2's is jump_relu.")
    shapes = shapes_of(weights)
    d_model, dict_size = (vector_length(weights, shapes, name) for name in ("b_dec", "b_enc"))
    expected: dict[str, Shape] = {"w_enc": (d_model, dict_size), "w_dec": (dict_size, d_model)}
    expected["threshold"] = (dict_size,)
    if config.get("affine_connection") or "affine_skip_connection" in shapes:
        expected["affine_skip_connection"] = (d_model, d_model)
    require_shapes(weights, shapes, expected, "its biases")
    writes = config.get("hf_hook_point_out") if kind == "transcoder" else None
    name = config.get("model_name")
    return DictionaryInfo(
        layout="gemma-scope-2",
        path=str(path),
        hook_point=chosen_hook_point(config.get("hf_hook_point_in"), hook_point, path, model_type or MODEL_TYPE),
        d_model=d_model,
        dict_size=dict_size,
        settings={"gate": "jumprelu", "apply_b_dec_to_input": False},
        model_names=(str(name),) if name else (),
        writes=writes and (points.known_as(writes, model_type or MODEL_TYPE) or writes),
    )


def read(info: DictionaryInfo, path: Path) -> FrozenDictionary:
    """Read the weights of an inspected dictionary."""
    tensors = {_NAMES.get(name, name): value for name, value in float_tensors(_files(path)[1]).items()}
    return Sae(info, tensors)


def _files(path: Path) -> tuple[Path, Path]:
    return (path, path / "params.safetensors") if path.is_dir() else (path.parent, path)


def _settings(folder: Path) -> dict[str, Any]:
    """Return config.json, or what the path says in its place: `<site>/layer_12_width_16k_l0_medium`."""
    if (folder / "config.json").is_file():
        return files.read_model(folder / "config.json", Record)
    where = re.search(r"/(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_", folder.absolute().as_posix())
    if where is None:
        return {}
    settings = {"hf_hook_point_in": f"blocks.{where[2]}.{_SITES[where[1]]}"}
    if where[1] == "transcoder":
        settings |= {"type": "transcoder", "hf_hook_point_out": f"blocks.{where[2]}.hook_mlp_out"}
    return settings
