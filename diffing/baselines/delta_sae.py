r"""Delta-activation SAEs: a dictionary of one model, trained on x_tuned - x_base, and how well it tells the difference.

    fve (affine)    1 - ||x - a x_hat - b||^2 / ||x - mean x||^2 at the best scalar a and vector b, so that a dictionary
                    of activations of another size is not at a disadvantage
    fve (OMP)       the same of orthogonal matching pursuit: at most k directions a token, chosen and fitted greedily

Reading order: `preset_config` and `one_model_stream` are what `training.loop.train` takes; `affine_fve`, `omp`,
`densities`; `local_deltas` is what one adapted map adds by itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from crosscoders import ActivationCache, CrosscoderConfig, TrainConfig
from crosscoders.activations.scored import moments_of
from crosscoders.activations.stream import BufferedStream
from crosscoders.common.errors import InputError
from crosscoders.models import hooks
from crosscoders.training.settings import PRESETS

_MOMENTS = 16_384
DENSE = 0.1
"""Share of tokens on which a dense latent is active."""


def preset_config(
    n_models: int, d_model: int, *, n_tokens: int, seed: int, device: str = "auto", l1: float | None = None
) -> TrainConfig:
    """Return the preset `demo` for a dictionary of so many models; `l1`: with that penalty in place of a fixed L0."""
    preset = PRESETS["demo"]
    shape = {name.split(".")[1]: value for name, value in preset.items() if "." in name}
    others = {name: value for name, value in preset.items() if "." not in name} | {"n_tokens": n_tokens}
    if l1 is not None:
        shape |= {"activation": "relu", "k": None}
        others |= {"l1_coefficient": l1, "aux_coefficient": 0.0}
    crosscoder = CrosscoderConfig(**shape, d_model=d_model, n_models=n_models)
    return TrainConfig(crosscoder=crosscoder, **others, seed=seed, device=device)


def differences(x: Float[Tensor, "tokens 2 d_model"]) -> Float[Tensor, "tokens 1 d_model"]:
    """Return tuned minus base in float32, as activations of one model."""
    x = x.float()
    return (x[:, 1] - x[:, 0])[:, None]


def base_alone(x: Float[Tensor, "tokens 2 d_model"]) -> Float[Tensor, "tokens 1 d_model"]:
    """Return the base's activations in float32, as those of one model."""
    return x[:, :1].float()


def one_model_stream(
    cache: ActivationCache,
    config: TrainConfig,
    of_pair: Callable[[Float[Tensor, "tokens 2 d_model"]], Float[Tensor, "tokens 1 d_model"]] = differences,
) -> BufferedStream:
    """Return batches of what `of_pair` makes of the activations in a cache of a pair, such as their differences."""

    def read(start: int, stop: int) -> Iterator[Float[Tensor, "_ 1 d_model"]]:
        return (of_pair(tokens.activations) for tokens in cache.parts(start, stop))

    return BufferedStream(
        read, n_tokens=len(cache), batch_size=config.batch_size, buffer_tokens=config.buffer_tokens, seed=config.seed,
        moments=moments_of(torch.cat(list(read(0, min(_MOMENTS, len(cache)))))),
    )  # fmt: skip


def affine_fve(x: Float[Tensor, "tokens d_model"], x_hat: Float[Tensor, "tokens d_model"]) -> float:
    """Return the fraction of variance explained by a x_hat + b at the best scalar a and vector b; 0 for a constant."""
    x, x_hat = (values.double() - values.double().mean(dim=0) for values in (x, x_hat))
    own = x_hat.square().sum()
    return float((x * x_hat).sum() ** 2 / (own * x.square().sum())) if own > 0 else 0.0


def omp(
    x: Float[Tensor, "tokens d_model"], directions: Float[Tensor, "candidates d_model"], k: int
) -> Float[Tensor, "tokens d_model"]:
    """Return the reconstruction of each row by orthogonal matching pursuit with at most `k` directions.

    Source: Pati, Rezaiifar and Krishnaprasad 1993. A new direction enters as what it adds to the span so far.
    """
    units = normalize(directions.float(), dim=1)
    x = x.float()
    basis = x.new_zeros(len(x), 0, x.shape[1])
    left = x.clone()
    for _ in range(min(k, len(units), x.shape[1])):
        best = units[(left @ units.T).abs().argmax(dim=1)]
        for _ in range(2):  # twice is enough for orthogonality (Giraud et al. 2005)
            best = best - torch.einsum("td,tkd,tke->te", best, basis, basis)
        best = normalize(best, dim=1)
        basis = torch.cat([basis, best[:, None]], dim=1)
        left = left - (left * best).sum(dim=1, keepdim=True) * best
    return x - left


def densities(latents: Float[Tensor, "tokens dict_size"]) -> dict[str, float]:
    """Return the mean density of latents that are ever active, and the shares of alive and of dense ones."""
    density = (latents > 0).float().mean(dim=0)
    alive = density > 0
    return {
        "density": float(density[alive].mean()) if alive.any() else 0.0,
        "alive": float(alive.float().mean()),
        "dense": float((density > DENSE).float().mean()),
        "l0": float(density.sum()),
    }


@contextlib.contextmanager
def local_deltas(
    model: Any, layer: int, site: str = "mlp.down_proj"
) -> Iterator[list[Float[Tensor, "rows seq width"]]]:
    """Collect what a LoRA adds to the output of one linear map, scale * B A x, while the adapted model runs.

    It is of that map alone and has the rank of the adapter; x is what the adapted model reads there, so that x_tuned -
    x_base holds more where layers below are adapted too.

    Raises:
        InputError: the map has no LoRA.
    """
    module: Any = hooks.decoder_layers(hooks.core_model(model))[layer].get_submodule(site)
    if not hasattr(module, "lora_B"):
        raise InputError(f"layer {layer} has no LoRA at {site!r}. Name a map that the adapter adapts.")
    ((name, last),) = module.lora_B.items()
    terms: list[Tensor] = []
    handle = last.register_forward_hook(lambda _m, _a, out: terms.append(module.scaling[name] * out.detach()))
    try:
        yield terms
    finally:
        handle.remove()
