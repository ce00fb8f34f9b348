"""The layout of dictionary_learning: config.json and a state dict whose buffers hold the settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.dictionary.settings import CrosscoderConfig
from crosscoders.formats.weights import _filled, read_weights

CODE_NORMALIZATION_IDS = {1: "sum", 2: "concat", 4: "none"}
"""Ids of the buffer `code_normalization_id`; 3 (mixed) and 5 (decoupled) are not supported."""


def _read_dictionary_learning(config: dict[str, Any], weights: Path) -> Crosscoder:
    """Read it; buffers decide over the config, from which k, threshold, norms and normaliser may be missing."""
    tensors = read_weights(weights)
    encoder = tensors.get("encoder.weight")
    if encoder is None or encoder.ndim != 3:
        kind = (
            "" if encoder is None else f" (an encoder with {encoder.ndim} axes, where a crosscoder has 3, is an SAE's)"
        )
        raise InputError(
            f"{weights} is not a crosscoder of a known layout: its tensors are {', '.join(sorted(tensors)[:5])}{kind}."
        )
    n_models, d_model, dict_size = tensors["encoder.weight"].shape
    norm_id = int(tensors.get("code_normalization_id", torch.tensor(1)))
    if norm_id not in CODE_NORMALIZATION_IDS:
        raise InputError(f"{weights} has code normalisation id {norm_id} (mixed or decoupled), which is not supported.")
    config = config.get("trainer", config)  # training checkpoints keep the settings one level down
    batchtopk = "k" in tensors or "BatchTopK" in str(config.get("dict_class", ""))
    shape = CrosscoderConfig(
        dict_size=dict_size,
        d_model=d_model,
        n_models=n_models,
        activation="batchtopk" if batchtopk else "relu",
        k=int(tensors["k"]) if "k" in tensors else config.get("k") if batchtopk else None,
        code_norm=CODE_NORMALIZATION_IDS[norm_id],  # type: ignore[arg-type]
    )
    mean, scale = _normaliser(tensors, n_models, d_model)
    canonical = {
        "W_enc": tensors["encoder.weight"],
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].permute(1, 0, 2),
        "b_dec": tensors["decoder.bias"],
        "input_mean": mean,
        "input_scale": scale,
        "threshold": tensors.get("threshold", torch.tensor(-1.0)),
        "is_folded": torch.tensor(False),
    }
    return _filled(Crosscoder(shape), canonical, weights)


def _normaliser(tensors: Mapping[str, Tensor], n_models: int, d_model: int) -> tuple[Tensor, Tensor]:
    """Return the mean and scale of each model: x' = (x - mean) target_rms / sqrt(sum_i std_i^2); NaN in the buffers
    means none."""
    mean, std = tensors.get("activation_mean"), tensors.get("activation_std")
    if mean is None or std is None or mean.isnan().any() or std.isnan().any():
        return torch.zeros(n_models, d_model), torch.ones(n_models)
    target = tensors.get("target_rms", torch.tensor(1.0))
    return mean, target / (std.pow(2).sum(dim=1) + 1e-8).sqrt()
