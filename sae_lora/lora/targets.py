"""Which weights of a model's layers LoRA can go to: linear maps, GPT-2's Conv1D, and tensors of all experts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from crosscoders.common.errors import InputError
from crosscoders.models import hooks


class Targets(NamedTuple):
    """By PEFT's names."""

    modules: list[str]
    parameters: list[str]
    """Three-dimensional tensors, a matrix for each expert."""
    is_transposed: bool
    """Whether the modules hold weights of shape (in, out)."""
    shapes: list[tuple[int, int, int]]
    """Matrices, and the two widths of each, of every module and parameter."""

    def n_weights(self, rank: int) -> int:
        """Weights of LoRA on all of them."""
        return sum(rank * n * (width_in + width_out) for n, width_in, width_out in self.shapes)

    def config(self, *, rank: int, alpha: float, dropout: float) -> Any:
        """PEFT's settings.

        Raises:
            InputError: dropout on the tensors of experts, which PEFT cannot do.
        """
        import peft

        if self.parameters and dropout:
            raise InputError(
                f"dropout = {dropout:g} has no meaning for LoRA on the weights of experts ({self.parameters[0]}). "
                "Set --dropout 0."
            )
        return peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=self.modules,
            target_parameters=self.parameters or None, fan_in_fan_out=self.is_transposed, bias="none",
            task_type="CAUSAL_LM",
        )  # fmt: skip


def find_targets(model: nn.Module, layers: Sequence[int]) -> Targets:
    """Every linear map of these decoder layers, alone or in a tensor of experts; routers keep their weights."""
    from transformers.pytorch_utils import Conv1D

    blocks = hooks.decoder_layers(model)
    wanted = {id(module) for layer in layers for module in blocks[layer].modules()}
    modules: list[str] = []
    parameters: list[str] = []
    shapes: list[tuple[int, int, int]] = []
    is_transposed = False
    for name, module in model.named_modules():
        if id(module) not in wanted or isinstance(module, _ConvNd):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            modules.append(name)
            shapes.append((1, *module.weight.shape))
            is_transposed = is_transposed or isinstance(module, Conv1D)
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3:
                parameters.append(f"{name}.{own}")
                shapes.append((weight.shape[0], weight.shape[1], weight.shape[2]))
    return Targets(modules, parameters, is_transposed, shapes)
