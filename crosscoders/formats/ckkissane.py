"""The layout of ckkissane: cfg.json and cc_weights.pt, for inputs that are scaled already."""

from pathlib import Path
from typing import Any

import torch

from crosscoders.common.errors import CorruptData, InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.dictionary.settings import CrosscoderConfig
from crosscoders.formats.weights import _filled, read_weights


def _read_ckkissane(config: dict[str, Any], weights: Path, input_scale: list[float] | None) -> Crosscoder:
    tensors = read_weights(weights)
    missing = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name not in tensors]
    if missing:
        raise InputError(f"{weights} has no tensor {missing[0]!r}; its tensors are {', '.join(sorted(tensors)[:5])}.")
    if tensors["W_enc"].ndim != 3:
        raise InputError(
            f"{weights} is not a crosscoder of a known layout: its W_enc has {tensors['W_enc'].ndim} axes; expected "
            "3, (n_models, d_model, dict_size)."
        )
    n_models, d_model, dict_size = tensors["W_enc"].shape
    if config.get("dict_size") not in (None, dict_size):
        raise CorruptData(
            f"cfg.json says dict_size {config['dict_size']} but {weights} has {dict_size}. Download both again."
        )
    if input_scale is not None and len(input_scale) != n_models:
        raise InputError(f"input_scale has {len(input_scale)} factors; this crosscoder reads {n_models} models.")
    shape = CrosscoderConfig(
        dict_size=dict_size, d_model=d_model, n_models=n_models, activation="relu", code_norm="sum"
    )
    canonical = {
        **{name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")},
        "input_mean": torch.zeros(n_models, d_model),
        "input_scale": torch.ones(n_models) if input_scale is None else torch.tensor(input_scale),
        "threshold": torch.tensor(-1.0),
        "is_folded": torch.tensor(False),
    }
    return _filled(Crosscoder(shape), canonical, weights)
