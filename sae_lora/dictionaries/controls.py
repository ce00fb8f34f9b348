r"""What is put in place of a dictionary to see whether a share of the gap closed says anything about it.

    identity          x_hat = x
    noise             x_hat = x + |err| u(x), err = decode(encode(x)) - x, u a unit vector that looks random
    no-latents        x_hat = decode(0), the same for every token: nothing is known of it
    random-decoder    decoder rows with random directions and the norms that they had, per model
    shuffled-decoder  latent j writes the decoder row of latent sigma(j), sigma a random permutation

The latents are those of the dictionary under every control, so L0 is too. u is a hash of the activation: a pure
function of x and the seed, without state, the same again when a run goes on and in all cells that read the same x. The
last bit of x changes all of it: a device or a batch that rounds x otherwise draws other noise. It takes no gradient.

`with_control` wraps dictionaries; `unit_noise` is u.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.dictionaries.settings import WITHOUT_LATENTS, ControlKind


class Control(FrozenDictionary):
    """A dictionary turned into a control; `source` is the dictionary, its decoder random if that is the control."""

    permutation: Tensor

    def __init__(self, source: FrozenDictionary, kind: ControlKind, seed: int) -> None:
        assert kind in get_args(ControlKind)
        super().__init__(replace(source.info, settings={**source.info.settings, "control": kind, "control_seed": seed}))
        self.source_identity = source.identity()
        self.kind, self.seed = kind, seed
        self.source = with_random_decoder(source, seed) if kind == "random-decoder" else source
        if kind == "shuffled-decoder":
            drawn = torch.randperm(source.info.dict_size, generator=torch.Generator().manual_seed(seed))
            self.register_buffer("permutation", drawn.to(decoder_of(source).device))

    def begin(self, ids: Int[Tensor, "rows seq"], attention_mask: Tensor | None) -> None:
        self.source.begin(ids, attention_mask)

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        return self.source.encode(x)

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        """Decode with the decoder controls; for the others see `reconstruct`."""
        assert self.kind not in WITHOUT_LATENTS
        if self.kind == "shuffled-decoder":  # sum_j f_j d_sigma(j) = sum_i f_sigma^-1(i) d_i
            latents = torch.zeros_like(latents).index_copy(1, self.permutation, latents)
        return self.source.decode(latents)

    def reconstruct(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens dict_size"], Float[Tensor, "tokens d_model"]]:
        if self.kind == "identity":
            return self.encode(x), x
        if self.kind == "noise":
            with torch.no_grad():
                latents, x_hat = self.source.reconstruct(x)
                noise = (x_hat - x).norm(dim=1, keepdim=True) * unit_noise(x, self.seed)
            return latents, x + noise.to(x.dtype)
        if self.kind == "no-latents":
            latents = self.encode(x)
            return latents, self.source.decode(torch.zeros_like(latents))
        return super().reconstruct(x)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the dictionary, with the hash of the control and, in `control`, what it was made
        from."""
        described = {"kind": self.kind, "seed": self.seed, "source_hash": self.source_identity["hash"]}
        return {**self.source_identity, "hash": self.content_hash(), "control": described}


def with_control(dictionaries: Sequence[FrozenDictionary], kind: ControlKind, seed: int) -> list[FrozenDictionary]:
    """Return the dictionaries, each turned into this control with a seed of its own; `none` leaves them as they are."""
    if kind == "none":
        return list(dictionaries)
    return [Control(dictionary, kind, seed + number) for number, dictionary in enumerate(dictionaries)]


def as_fitted(dictionaries: Sequence[FrozenDictionary], sidecar: dict[str, Any]) -> list[FrozenDictionary]:
    """Return the dictionaries, with the control that a fit's sidecar names."""
    control = sidecar["dictionaries"][0]["control"] or {"kind": "none", "seed": 0}
    return with_control(dictionaries, control["kind"], control["seed"])


def decoder_of(dictionary: FrozenDictionary) -> Float[Tensor, "dict_size *models d_model"]:
    """Return the decoder's weights in any layout, in place."""
    return next(value for name, value in dictionary.state_dict().items() if name.split(".")[-1] == "W_dec")


def with_random_decoder(dictionary: FrozenDictionary, seed: int) -> FrozenDictionary:
    """Return a copy whose decoder rows have random directions, isotropic, and the norms that they had.

    Raises:
        InputError: the encoder is the decoder.
    """
    if dictionary.info.settings.get("architecture") == "matching_pursuit":
        raise InputError(
            f"control random-decoder would change the latents of {dictionary.info.path!r}, a matching_pursuit SAE, "
            "whose encoder is its decoder. Use shuffled-decoder."
        )
    copied = copy.deepcopy(dictionary)
    W_dec = decoder_of(copied)
    drawn = torch.randn(W_dec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        W_dec.device
    )
    norms = W_dec.double().norm(dim=-1, keepdim=True)
    W_dec.copy_(drawn / drawn.norm(dim=-1, keepdim=True) * norms)
    return copied


# ---------------------------------------------------------------------------------------------------------- the noise


def unit_noise(x: Float[Tensor, "tokens d_model"], seed: int) -> Float[Tensor, "tokens d_model"]:
    """Return an isotropic unit vector for each token, a pure function of its float32 bits and the seed.

    The bits are hashed to a 64-bit key, which starts a SplitMix64 sequence of d_model numbers (Steele, Lea, Flood
    2014); normal quantiles of those, normalised.
    """
    d_model = x.shape[1]
    odd = torch.randint(-(2**62), 2**62, (d_model,), generator=torch.Generator().manual_seed(seed)) * 2 + 1
    bits = x.float().contiguous().view(torch.int32).long()
    keys = _mixed((bits * odd.to(x.device)).sum(dim=1))
    steps = torch.arange(1, d_model + 1, device=x.device) * (0x9E3779B97F4A7C15 - 2**64)  # 2^64 / golden ratio, odd
    numbers = _mixed(keys[:, None] + steps)
    uniform = (_shifted(numbers, 11).double() + 0.5) / 2**53
    normal = torch.erfinv(2 * uniform - 1) * math.sqrt(2)
    return (normal / normal.norm(dim=1, keepdim=True)).to(x.dtype)


def _mixed(z: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Apply the finalizer of SplitMix64."""
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


def _shifted(z: Int[Tensor, "*shape"], n_bits: int) -> Int[Tensor, "*shape"]:
    """Shift logically to the right; torch's own copies the sign."""
    return (z >> n_bits) & ((1 << (64 - n_bits)) - 1)
