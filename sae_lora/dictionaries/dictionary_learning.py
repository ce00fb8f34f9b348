"""dictionary_learning: a folder `<submodule>/trainer_N` of `ae.pt` and `config.json`, read without unpickling.

Standard, top-k, BatchTopK (Matryoshka too), JumpReLU and gated SAEs, as the class in `dict_class` encodes at inference.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.formats.weights import read_weights
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, Sae
from sae_lora.dictionaries.places import chosen_hook_point
from sae_lora.dictionaries.tensors import Shape, float_tensors, require_shapes, vector_length

_GATES = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "GatedAutoEncoder": ("gated", True),
}
"""Class -> the gate at inference, and whether the decoder's bias is taken from the input first."""
_NAMES = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec",
    "bias": "b_dec", "decoder_bias": "b_dec",
}  # fmt: skip


def inspect(path: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    """Return what headers and settings say of a folder or its `ae.pt`."""
    weights = _weights(path)
    trainer = files.read_model(weights.parent / "config.json", Record).get("trainer") or {}
    dict_class = str(trainer.get("dict_class"))
    if dict_class not in _GATES:
        raise InputError(f"{str(path)!r} has dict_class {dict_class!r}; {', '.join(_GATES)} are read.")
    gate, subtracts = _GATES[dict_class]
    settings: dict[str, Any] = {"gate": gate, "apply_b_dec_to_input": subtracts}
    shapes = {name: tuple(value.shape) for name, value in _canonical(read_weights(weights, "meta")).items()}
    d_model = vector_length(weights, shapes, "b_dec")
    dict_size = vector_length(weights, shapes, "gate_bias" if gate == "gated" else "b_enc")
    expected: dict[str, Shape] = {"W_enc": (d_model, dict_size), "W_dec": (dict_size, d_model)}
    if gate == "gated":
        expected |= {"r_mag": (dict_size,), "mag_bias": (dict_size,)}
    if gate == "jumprelu":
        expected["threshold"] = () if "BatchTopK" in dict_class else (dict_size,)
    require_shapes(weights, shapes, expected, "its biases")
    if gate == "topk":
        settings["k"] = _k(trainer.get("k"), path)
    place = trainer.get("submodule_name")
    if isinstance(place, str) and place.startswith("resid_post_layer_"):
        place = f"blocks.{place.removeprefix('resid_post_layer_')}.hook_resid_post"
    name = trainer.get("lm_name")
    return DictionaryInfo(
        layout="dictionary-learning",
        path=str(path),
        hook_point=chosen_hook_point(place, hook_point, path, model_type),
        d_model=d_model,
        dict_size=dict_size,
        settings=settings,
        model_names=(str(name),) if name else (),
    )


def read(info: DictionaryInfo, path: Path) -> FrozenDictionary:
    """Read the weights of an inspected dictionary.

    Raises:
        InputError: a BatchTopK SAE saved before its threshold was known, whose latents depend on their batch.
        CorruptData: numbers that are not finite.
    """
    tensors = _canonical(float_tensors(_weights(path)))
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    if info.settings["gate"] == "jumprelu":
        names.append("threshold")
        if tensors["threshold"].ndim == 0 and tensors["threshold"] < 0:
            raise InputError(f"{info.path!r} was saved before its threshold was known. Use a later checkpoint.")
    if info.settings["gate"] == "gated":
        names += ["scale", "shift"]
        tensors["b_enc"], tensors["scale"] = tensors["gate_bias"], tensors["r_mag"].exp()
        tensors["shift"] = tensors["mag_bias"] - tensors["scale"] * tensors["gate_bias"]
    return Sae(info, {name: tensors[name].contiguous() for name in names})


def _weights(path: Path) -> Path:
    return path / "ae.pt" if path.is_dir() else path


def _k(k: object, path: Path) -> int:
    if not isinstance(k, int) or k < 1:
        raise InputError(f"{str(path)!r} has k {k!r} in its config.json; expected a whole number.")
    return k


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return them under our names; weights of linear layers are stored the other way round."""
    return {
        _NAMES.get(name, name): value.T if name in ("encoder.weight", "decoder.weight") else value
        for name, value in tensors.items()
    }
