"""What tests of `sae-lora fit` open before they fit."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from crosscoders import Crosscoder, CrosscoderConfig
from crosscoders.models.names import hash_model
from sae_lora import FitConfig
from sae_lora.dictionaries.controls import with_control
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary
from sae_lora.fitting.inputs import load_dictionaries, load_model, make_plan
from sae_lora.fitting.settings import pair_up

D, F = 16, 24
POINT = "blocks.1.hook_resid_post"


class Identity(FrozenDictionary):
    def __init__(self, hook_point: str = POINT) -> None:
        super().__init__(DictionaryInfo("constant", "", hook_point, D, D, {}))
        self.register_buffer("unit", torch.ones(1))

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.unit


def archive(path: Path, threshold: float = 0.05) -> Path:
    """A file of Gemma Scope's layout, which does not say its hook point."""
    W_dec = np.random.default_rng(0).normal(size=(F, D)) / D**0.5
    arrays = {
        "W_enc": W_dec.T, "W_dec": W_dec, "b_enc": np.zeros(F), "b_dec": np.zeros(D),
        "threshold": np.full(F, threshold),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value.astype(np.float32) for name, value in arrays.items()})
    return path


def gemma_scope(root: Path) -> Path:
    """A folder in the published layout, for layer 1 of the tiny Gemma-2."""
    folder = root / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_9"
    return archive(folder / "params.npz", threshold=0.1).parent


def pair_crosscoder(folder: Path, pair: Any) -> Path:
    """A crosscoder of two models with a record of the pair."""
    made = Crosscoder(CrosscoderConfig(dict_size=F, activation="relu", d_model=D)).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for weight in made.parameters():
        weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    names = {name: {"name": model, "hash": hash_model(model)}
             for name, model in (("base", pair.base), ("tuned", pair.tuned))}  # fmt: skip
    made.save(folder, provenance={"cache": {"hook_point": POINT, **names}})
    return folder


def fit_config(pair: Any, scope: Path, **changes: object) -> FitConfig:
    settings: dict[str, object] = {
        "model": pair.tuned, "dictionary": str(scope), "data": pair.data, "n_tokens": 500, "context_length": 40,
        "batch_rows": 4, "rank": 4, "lr": 1e-2, "log_every": 2, "checkpoint_every": 2,
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})  # type: ignore[arg-type]


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def opened(settings: FitConfig) -> Any:
    """Plan, model, dictionaries or controls, batches."""
    plan = make_plan(settings, settings.model, pair_up(settings.dictionary, settings.hook_point), settings.side)
    device = torch.device("cpu")
    dictionaries = with_control(load_dictionaries(plan, settings, device), settings.control, settings.seed)
    return plan, load_model(plan, settings, device), dictionaries, list(plan.batches(settings.batch_rows, device))
