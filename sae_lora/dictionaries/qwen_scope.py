"""Qwen Scope: one file `layerN.sae.pt` for each layer of the residual stream, top-k, read without unpickling.

No file holds k: it is in the name of the repository, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50.
"""

import re
from pathlib import Path

from crosscoders.common.errors import InputError
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, Sae
from sae_lora.dictionaries.places import chosen_hook_point
from sae_lora.dictionaries.tensors import float_tensors, require_shapes, shapes_of, vector_length

FILE = re.compile(r"layer(\d+)\.sae\.pt")


def inspect(path: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    """Return what headers and names say of a file, or of a folder with only one."""
    weights = _weights(path)
    layer = FILE.fullmatch(weights.name)
    assert layer is not None
    where = weights.absolute().as_posix()
    k, model = re.search(r"L0_(\d+)", where), re.search(r"SAE-Res-([\w.-]+?)-W\d+K", where)
    if k is None:
        raise InputError(
            f"{str(path)!r} does not say k, which only the name of its repository does. Put it into a folder of that "
            "name, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50."
        )
    shapes = shapes_of(weights)
    d_model, dict_size = (vector_length(weights, shapes, name) for name in ("b_dec", "b_enc"))
    expected = {"W_enc": (dict_size, d_model), "W_dec": (d_model, dict_size)}
    require_shapes(weights, shapes, dict(expected), "its biases")
    return DictionaryInfo(
        layout="qwen-scope",
        path=str(path),
        hook_point=chosen_hook_point(f"blocks.{layer[1]}.hook_resid_post", hook_point, path, model_type),
        d_model=d_model,
        dict_size=dict_size,
        settings={"gate": "topk", "k": int(k[1]), "apply_b_dec_to_input": False},
        model_names=(f"Qwen/{model[1]}",) if model else (),
    )


def read(info: DictionaryInfo, path: Path) -> FrozenDictionary:
    """Read the weights of an inspected dictionary."""
    tensors = float_tensors(_weights(path))
    turned = {name: tensors[name].T.contiguous() for name in ("W_enc", "W_dec")}
    return Sae(info, {**turned, "b_enc": tensors["b_enc"], "b_dec": tensors["b_dec"]})


def _weights(path: Path) -> Path:
    if path.is_file():
        return path
    layers = sorted(file.name for file in path.iterdir() if FILE.fullmatch(file.name))
    if len(layers) > 1:
        raise InputError(
            f"{str(path)!r} holds the SAEs of {len(layers)} layers. Give the file of one, such as "
            f"{str(path / layers[0])!r}."
        )
    return path / layers[0]
