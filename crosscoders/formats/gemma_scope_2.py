"""Gemma Scope 2's crosscoders over layers of one model: `params_layer_{0..n-1}.safetensors` and `config.json`.

File i holds the latents that read layer i: `w_enc` (d_model, dict_size/n), `b_enc`, `threshold`; `w_dec`
(dict_size/n, n, d_model), which writes to every layer; and `b_dec` (d_model) of layer i. A slot of the class is a layer
here, so W_enc is zero but for one block per slot, and the latents are those of file 0, then of file 1, and so on.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.dictionary.settings import CrosscoderConfig
from crosscoders.formats.weights import _filled

FIRST = "params_layer_0.safetensors"


class Layers(NamedTuple):
    """What names and settings say."""

    layers: list[int]
    """Layers of the model that the slots are, by their residual stream's output."""
    model_name: str | None


def is_over_layers(path: Path) -> bool:
    """Say whether a folder holds such a crosscoder."""
    return (path / FIRST).is_file()


def read_layers(folder: Path) -> Layers:
    """Return which layers a crosscoder reads, by its config.json or, without it, its folder's name.

    Raises:
        InputError: nothing says it, another type, or not one file for each layer.
    """
    config = files.read_model(folder / "config.json", Record) if (folder / "config.json").is_file() else {}
    if config.get("type", "crosscoder") != "crosscoder":
        raise InputError(f"{folder} is a {config['type']} of Gemma Scope 2 by its config.json; expected a crosscoder.")
    places = config.get("hf_hook_point_in")
    names = places if isinstance(places, list) else [str(places or "")]
    braces = re.fullmatch(r"model\.layers\.\{([\d, ]+)\}\.output", names[0])
    single = [re.fullmatch(r"model\.layers\.(\d+)\.output", str(name)) for name in names]
    named = re.match(r"layer_([\d_]+)_width_", folder.absolute().name)
    if braces:
        layers = [int(layer) for layer in braces[1].split(",")]
    elif all(single):
        layers = [int(match[1]) for match in single if match]
    elif named and not places:
        layers = [int(layer) for layer in named[1].split("_")]
    else:
        raise InputError(
            f"{folder} does not say which layers it reads ({places!r} in its config.json). Use the folder as "
            "published, such as layer_5_9_12_15_width_65k_l0_medium."
        )
    n_files = len(list(folder.glob("params_layer_*.safetensors")))
    if n_files != len(layers):
        raise InputError(
            f"{folder} reads {len(layers)} layers but holds {n_files} files params_layer_N.safetensors. "
            "Download it again."
        )
    name = config.get("model_name")
    return Layers(layers, str(name) if name else None)


def _read_gemma_scope_2(folder: Path) -> Crosscoder:
    """Read it; every latent has its threshold, so the gate is JumpReLU."""
    n_layers = len(read_layers(folder).layers)
    parts = [_part(folder / f"params_layer_{layer}.safetensors") for layer in range(n_layers)]
    d_model, n_latents = len(parts[0]["b_dec"]), len(parts[0]["b_enc"])
    W_enc = torch.zeros(n_layers, d_model, n_layers * n_latents)
    for layer, part in enumerate(parts):
        expected = {
            "w_enc": (d_model, n_latents), "w_dec": (n_latents, n_layers, d_model), "b_enc": (n_latents,),
            "threshold": (n_latents,), "b_dec": (d_model,),
        }  # fmt: skip
        for name, shape in expected.items():
            if tuple(part[name].shape) != shape:
                raise InputError(
                    f"{folder}/params_layer_{layer}.safetensors: {name!r} has shape {tuple(part[name].shape)}, "
                    f"expected {shape}. Use the files as published."
                )
        W_enc[layer, :, layer * n_latents : (layer + 1) * n_latents] = part["w_enc"]
    config = CrosscoderConfig(
        dict_size=n_layers * n_latents, activation="jumprelu", code_norm="none", n_models=n_layers, d_model=d_model
    )
    crosscoder = Crosscoder(config)
    together = {
        "W_enc": W_enc,
        "W_dec": torch.cat([part["w_dec"] for part in parts]),
        "b_dec": torch.stack([part["b_dec"] for part in parts]),
        **{name: torch.cat([part[name] for part in parts]) for name in ("b_enc", "threshold")},
    }
    return _filled(crosscoder, {**crosscoder.state_dict(), **together}, folder)


def _part(path: Path) -> dict[str, torch.Tensor]:
    tensors = files.read_tensors(path)
    if missing := {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} - tensors.keys():
        raise InputError(f"{path} has no tensor {min(missing)!r}; it holds {', '.join(sorted(tensors)[:6]) or 'none'}.")
    return tensors
