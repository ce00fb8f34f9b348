"""Dictionaries in the layouts of their publishers, small and random."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, F = 6, 10
POINT = "blocks.1.hook_resid_post"
X = torch.randn(7, D, generator=torch.Generator().manual_seed(9))


def arrays(seed: int = 0, d_model: int = D, dict_size: int = F) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "W_enc": draw.normal(size=(d_model, dict_size)).astype(np.float32),
        "W_dec": draw.normal(size=(dict_size, d_model)).astype(np.float32),
        "b_enc": draw.normal(size=dict_size).astype(np.float32),
        "b_dec": draw.normal(size=d_model).astype(np.float32),
        "threshold": np.abs(draw.normal(size=dict_size)).astype(np.float32),
    }


def gemma_scope(root: Path, content: dict[str, np.ndarray] | None = None, layer: int = 1) -> Path:
    folder = root / "gemma-scope-2b-pt-res" / f"layer_{layer}" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **(content or arrays()))
    return folder


def sae_lens(folder: Path, **changes: object) -> Path:
    """A folder of SAELens 6, written by hand; None removes a key."""
    folder.mkdir()
    tensors = {name: torch.from_numpy(value) for name, value in arrays(1).items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    config: dict[str, object] = {
        "architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": POINT, "model_name": "tiny"},
    }  # fmt: skip
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder
