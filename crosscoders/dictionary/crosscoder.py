r"""The crosscoder: one sparse dictionary over the activations of several models.

    x'     = (x - input_mean) * input_scale                  training space, one scale per model
    pre    = sum_m x'_m W_enc[m] + b_enc
    f      = gate(ReLU(pre))                                 latents, (batch, dict_size)
    x_hat  = (f W_dec + b_dec) / input_scale + input_mean    units of x

Latents, thresholds and decoder norms live in training space; `encode` takes and `decode` gives the units of x.
Reading order: parameters, `encode`, the gates, `decode`, norms, `fold`, `save`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosscoders.common import files, hub
from crosscoders.common.errors import InputError
from crosscoders.dictionary.norms import code_norm
from crosscoders.dictionary.settings import CrosscoderConfig

FORMAT_VERSION = 1
Gate = Literal["inference", "batchtopk", "relu"]


def batch_top_k(scaled: Float[Tensor, "batch dict_size"], k: int) -> Bool[Tensor, "batch dict_size"]:
    """Return the mask of exactly the k * batch largest entries of the whole batch, zeros included if need be."""
    chosen = scaled.flatten().topk(min(k * len(scaled), scaled.numel()), sorted=False).indices
    mask = torch.zeros(scaled.numel(), dtype=torch.bool, device=scaled.device)
    mask[chosen] = True
    return mask.view_as(scaled)


class Crosscoder(nn.Module):
    """One dictionary of `dict_size` latents over `n_models` models; see the module's equations.

    `input_mean`, `input_scale` and `threshold` are saved with the weights. A threshold below 0 means that none was
    tracked yet; the inference gate is then plain ReLU. With activation jumprelu it is a vector, one for each latent.
    """

    input_scale: Tensor
    input_mean: Tensor
    threshold: Tensor
    is_folded: Tensor

    def __init__(self, config: CrosscoderConfig) -> None:
        super().__init__()
        if config.d_model is None:
            raise InputError("a Crosscoder needs crosscoder.d_model, the width of the activations. Set it.")
        n_models, d_model, dict_size = config.n_models, config.d_model, config.dict_size
        self.config = config
        # Stored latent by latent, like W_dec: the sparse gradient comes in that order and needs no transposed copy.
        self.W_enc = nn.Parameter(torch.zeros(dict_size, n_models, d_model).permute(1, 2, 0))
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(torch.zeros(dict_size, n_models, d_model))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        self.register_buffer("input_scale", torch.ones(n_models))
        self.register_buffer("input_mean", torch.zeros(n_models, d_model))
        self.register_buffer("threshold", torch.full((dict_size,) * (config.activation == "jumprelu"), -1.0))
        self.register_buffer("is_folded", torch.tensor(False))

    @torch.no_grad()
    def init_weights_(self, *, norm: float, generator: torch.Generator) -> None:
        """Draw Kaiming-uniform directions of one norm, the same for every model; encoder = decoder transposed.

        The same start for every model is what makes norm and cosine differences come from the data; independent starts
        leave 5 of 501 latents of a model against itself with a decoder cosine below 0.8.
        """
        directions = torch.empty(self.config.dict_size, self.W_dec.shape[2])
        nn.init.kaiming_uniform_(directions, generator=generator)
        directions = norm * directions / directions.norm(dim=1, keepdim=True)
        self.W_dec.copy_(directions[:, None, :].expand_as(self.W_dec))
        self.W_enc.copy_(self.W_dec.permute(1, 2, 0))

    # ------------------------------------------------------------------------------------------------------ encoder

    def normalise(self, x: Float[Tensor, "batch n_models d_model"]) -> Float[Tensor, "batch n_models d_model"]:
        """Bring x to training space; once folded x stays as it is, since the weights then do it."""
        return x if self.is_folded else self.to_training_space(x)

    def pre_acts(self, normalised: Float[Tensor, "batch n_models d_model"]) -> Float[Tensor, "batch dict_size"]:
        """Return sum_m x'_m W_enc[m] + b_enc, as one matrix product over all models."""
        return torch.addmm(self.b_enc, normalised.flatten(1), self.W_enc.flatten(0, 1))

    def encode(
        self, x: Float[Tensor, "batch n_models d_model"], *, gate: Gate = "inference", k: int | None = None
    ) -> Float[Tensor, "batch dict_size"]:
        r"""Return the latents of a batch.

        gate "inference": f_j = ReLU(pre_j) where ReLU(pre_j) c_j > threshold, so no token depends on its batch;
        "batchtopk": the k * batch largest ReLU(pre_j) c_j of this batch (training); "relu": all positive ones.

        Raises:
            InputError: the width or number of models is not that of the weights.
        """
        self._require_shape(x)
        return self.gate(torch.relu(self.pre_acts(self.normalise(x))), gate, k)

    def gate(
        self, positive: Float[Tensor, "batch dict_size"], gate: Gate, k: int | None = None
    ) -> Float[Tensor, "batch dict_size"]:
        """Put to 0 what the gate does not let through."""
        if gate == "batchtopk":
            chosen = k if k is not None else self.config.k
            if chosen is None:
                raise InputError("gate 'batchtopk' needs k, and this crosscoder was trained without one. Pass k=....")
            return positive * batch_top_k((positive * self.code_norm).detach(), chosen)
        if gate == "inference" and self.config.activation != "relu":
            return positive * (positive * self.code_norm > self.threshold)
        return positive

    def gate_at(self) -> Float[Tensor, " dict_size"]:
        """Return the inference gate as one number >= 0 per latent: latent j is active where pre_j > gate_at_j."""
        if self.config.activation == "relu" or bool((self.threshold < 0).all()):
            return torch.zeros_like(self.b_enc)
        c = self.code_norm
        return torch.where(c > 0, self.threshold.clamp(min=0) / c, torch.inf)

    def _require_shape(self, x: Tensor) -> None:
        n_models, d_model, _ = self.W_enc.shape
        if x.ndim != 3 or tuple(x.shape[1:]) != (n_models, d_model):
            raise InputError(
                f"activations of shape {tuple(x.shape)} do not fit this crosscoder, which reads "
                f"(batch, {n_models}, {d_model}). Use the cache that it was trained on."
            )

    # ------------------------------------------------------------------------------------------------------ decoder

    def decode_normalised(self, latents: Float[Tensor, "batch dict_size"]) -> Float[Tensor, "batch n_models d_model"]:
        """Return f W_dec + b_dec, in training space (in the units of x once folded)."""
        return torch.addmm(self.b_dec.flatten(), latents, self.W_dec.flatten(1)).unflatten(1, self.b_dec.shape)

    def denormalise(
        self, normalised: Float[Tensor, "batch n_models d_model"]
    ) -> Float[Tensor, "batch n_models d_model"]:
        """Bring what is in training space back to the units of x."""
        if self.is_folded:
            return normalised
        return normalised / self.input_scale[:, None] + self.input_mean

    def decode(self, latents: Float[Tensor, "batch dict_size"]) -> Float[Tensor, "batch n_models d_model"]:
        """Return the reconstruction in the units of x."""
        return self.denormalise(self.decode_normalised(latents))

    def forward(self, x: Float[Tensor, "batch n_models d_model"]) -> Float[Tensor, "batch n_models d_model"]:
        """Return decode(encode(x)) with the inference gate."""
        return self.decode(self.encode(x))

    # -------------------------------------------------------------------------------------------------------- norms

    def decoder(self) -> Float[Tensor, "dict_size n_models d_model"]:
        """Return the decoder in training space, whether folded or not."""
        return self.W_dec * self.input_scale[:, None] if self.is_folded else self.W_dec

    def decoder_bias(self) -> Float[Tensor, "n_models d_model"]:
        """Return the decoder bias in training space, whether folded or not."""
        return self.to_training_space(self.b_dec) if self.is_folded else self.b_dec

    def to_training_space(
        self, x: Float[Tensor, "*batch n_models d_model"]
    ) -> Float[Tensor, "*batch n_models d_model"]:
        """Return (x - input_mean) * input_scale, whether folded or not."""
        return (x - self.input_mean) * self.input_scale[:, None]

    @property
    def decoder_norms(self) -> Float[Tensor, "dict_size n_models"]:
        """Return the L2 norm of each latent's decoder in each model, training space."""
        return self.decoder().norm(dim=2)

    @property
    def code_norm(self) -> Float[Tensor, " dict_size"]:
        """Return c_j by the config's rule."""
        return code_norm(self.decoder_norms, self.config.code_norm)

    @property
    def relative_decoder_norm(self) -> Float[Tensor, " dict_size"]:
        r"""Return how the two decoder norms of each latent relate: 0 base-only, 0.5 shared, 1 tuned-only.

            0.5 (1 + (||d_tuned|| - ||d_base||) / max(||d_tuned||, ||d_base||))

        It is 0.5 where both norms are 0. Source: Minder et al. 2025, arXiv 2504.02922 (their CSV column is the
        mirror image).
        """
        if self.config.n_models != 2:
            raise InputError(f"relative_decoder_norm compares two models; this crosscoder has {self.config.n_models}.")
        base, tuned = self.decoder_norms.unbind(dim=1)
        largest = torch.maximum(base, tuned)
        return 0.5 * (1 + (tuned - base) / torch.where(largest > 0, largest, 1.0))

    # ---------------------------------------------------------------------------------------------------- fold, save

    @torch.no_grad()
    def fold(self) -> "Crosscoder":
        """Return a copy with the normaliser folded into the weights; folding it again changes nothing.

        encode, decode, decoder_norms, gates and classes are equal; only W and b are now in the units of x.
        """
        import copy

        folded = copy.deepcopy(self)
        if self.is_folded:
            return folded
        scale = self.input_scale
        shift = (self.input_mean * scale[:, None]).flatten() @ self.W_enc.flatten(0, 1)
        folded.W_enc.copy_(self.W_enc * scale[:, None, None])
        folded.b_enc.copy_(self.b_enc - shift)
        folded.W_dec.copy_(self.W_dec / scale[:, None])
        folded.b_dec.copy_(self.b_dec / scale[:, None] + self.input_mean)
        folded.is_folded.fill_(True)
        return folded

    def save(self, folder: str | Path, *, provenance: dict[str, Any] | None = None) -> None:
        """Write `model.safetensors`, then `config.json` with its checksum; `load_crosscoder` reads them."""
        folder = Path(folder)
        written = files.write_tensors(folder / "model.safetensors", dict(self.state_dict()))
        described = {
            "format": "model-diffing/crosscoder",
            "format_version": FORMAT_VERSION,
            "crosscoder": asdict(self.config),
            "weights": written._asdict(),
            **({"provenance": provenance} if provenance else {}),
        }
        files.write_json(folder / "config.json", described)

    def push_to_hub(self, repo: str, *, private: bool = True) -> str:
        """Upload weights, config and a short card to a hub repository and return its address; `diffing.push_to_hub`
        makes the card from a run.

        Raises:
            InputError: `repo` is no name of a repository.
            EnvironmentFault: the hub refuses, or cannot be reached.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            shape = json.dumps(asdict(self.config))
            card = f"---\ntags: [crosscoder, model-diffing]\n---\n# Crosscoder\n\n```json\n{shape}\n```\n"
            (Path(folder) / "README.md").write_text(card)
            return hub.upload(Path(folder), repo, private=private)
