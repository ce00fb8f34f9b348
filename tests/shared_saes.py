"""SAEs of the tiny pair: random JumpReLU weights in SAELens's layout, and the settings of `diffing sae` around them."""

import json
from pathlib import Path

import torch
from conftest import Pair
from dictionaries import arrays
from safetensors.torch import save_file

from diffing.sae.settings import SaeSettings

POINT = "blocks.1.hook_resid_post"
WIDTH, SIZE = 16, 24


def jumprelu(folder: Path, *, seed: int = 3, d_model: int = WIDTH, hook_point: str = POINT, roll: int = 0) -> Path:
    """A JumpReLU SAE, small and random; `roll` moves every latent to another number."""
    folder.mkdir(parents=True)
    tensors = {name: torch.from_numpy(value) for name, value in arrays(seed, d_model, SIZE).items()}
    tensors["threshold"] *= 0.2
    if roll:
        tensors |= {name: tensors[name].roll(roll, dims=-1).contiguous() for name in ("W_enc", "b_enc", "threshold")}
        tensors["W_dec"] = tensors["W_dec"].roll(roll, dims=0).contiguous()
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu", "d_in": d_model, "d_sae": SIZE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": hook_point, "model_name": "tiny"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def settings(pair: Pair, folder: Path, sae: Path, **changes: object) -> SaeSettings:
    """Return settings that read 600 tokens of the pair's documents."""
    given = {"base": pair.base, "tuned": pair.tuned, "sae": str(sae), "data": pair.data, "out": str(folder)}
    small = {"n_tokens": 600, "n_documents": 6, "n_latents": 4, "batch_rows": 4}
    return SaeSettings(**given | small | changes)  # type: ignore[arg-type]
