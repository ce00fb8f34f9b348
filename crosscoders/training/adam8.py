"""8-bit Adam by torchao: both moments of a weight as a byte each, in blocks of 256 with a scale of their own.

A block has to lie within one latent: latents are active at very different rates, and where a rare one shares its scale
with a common one its second moment becomes 0 and training diverges (docs/log.md). Biases keep float32 moments for the
same reason. Source: Dettmers et al. 2022 (arXiv 2110.02861), as torchao has it.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosscoders.common.errors import EnvironmentFault, InputError

BLOCK = 256


def require_torchao() -> None:
    """Raise EnvironmentFault where torchao is not installed; imports nothing."""
    if importlib.util.find_spec("torchao") is None:
        raise EnvironmentFault(
            "adam_bits 8 needs the package torchao. Run: pip install 'model-diffing[low-memory]', or leave it at 32."
        )


def adam_8bit(parameters: Sequence[Tensor], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Return torchao's Adam for tensors that are contiguous by latent; its learning rate is a tensor, to be filled.

    Raises:
        InputError: a block would hold weights of several latents.
        EnvironmentFault: torchao is not installed.
    """
    require_torchao()
    width = next(p[0].numel() for p in parameters if p.ndim == 3)
    if width % BLOCK:
        raise InputError(
            f"adam_bits 8 keeps one scale for {BLOCK} weights, which must be of one latent, but n_models * d_model is "
            f"{width}. Leave adam_bits at 32."
        )
    from torchao.optim import Adam8bit

    # PyTorch's cache of compiled steps has no key for the quantised state and says so once.
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement")

    class OfWeights(Adam8bit):  # type: ignore[misc]
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return super()._new_buffer(p, signed) if p.ndim == 3 else torch.zeros_like(p)

    return OfWeights(parameters, betas=betas)


def parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a tensor of an optimiser's state as plain tensors: itself, or `name.codes`, `.scale` and `.qmap`."""
    if type(value) is Tensor:
        return {name: value}
    quantised: Any = value
    return {f"{name}.{part}": getattr(value, part) for part in quantised.__tensor_flatten__()[0]}


def joined(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of one parameter from what `parts` gave."""
    state = {name: value for name, value in entry.items() if "." not in name}
    for name in dict.fromkeys(key.split(".")[0] for key in entry if "." in key):
        require_torchao()
        from torchao.optim.subclass_8bit import OptimState8bit

        codes, scale, qmap = (entry[f"{name}.{part}"] for part in ("codes", "scale", "qmap"))
        state[name] = OptimState8bit(codes, scale, qmap, signed=name == "exp_avg")
    return state
