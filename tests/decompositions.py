"""The model that the published objective was recorded on, and a task for models of vectors."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from diffing.decomposition.importance import ScalarNetwork
from diffing.decomposition.losses.reconstruction import mean_kl
from diffing.decomposition.model import Decomposition, Importance
from diffing.decomposition.sigmoids import lower_leaky, upper_leaky
from diffing.decomposition.sites import Delta, Site, matrix

RECORDED = Path(__file__).parent / "data" / "vpd"
COUNTED = torch.ones(3, 4, dtype=torch.bool)


def recorded(number: str) -> dict[str, Tensor]:
    """Return the tensors of one file of recorded values, such as "06"."""
    (path,) = RECORDED.glob(f"{number}_*.safetensors")
    return dict(load_file(path))


class RecordedModel(nn.Module):
    """head @ b(tanh(a(embed[ids])))"""

    def __init__(self) -> None:
        super().__init__()
        values = recorded("00")
        self.embed, self.head = values["embed"], values["head"]
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 8, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(values["W_a"])
            self.a.bias.copy_(values["bias_a"])
            self.b.weight.copy_(values["W_b"])

    def forward(self, ids: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows seq vocab"]:
        logits: Tensor = self.b(torch.tanh(self.a(self.embed[ids]))) @ self.head.T
        return logits


class RecordedTask:
    """All positions count, and the distance is KL."""

    distance = staticmethod(mean_kl)

    def outputs(self, model: Any, batch: Tensor) -> Float[Tensor, "answers out"]:
        logits: Tensor = model(batch)
        return logits.flatten(0, 1)

    def counted(self, batch: Tensor) -> Bool[Tensor, "*positions"]:
        return COUNTED


def recorded_decomposition() -> Decomposition:
    """Return the recorded model with the recorded pieces."""
    values, model = recorded("00"), RecordedModel()
    generator = torch.Generator().manual_seed(0)
    sites, networks = {}, {}
    for name, n_components in (("a", 6), ("b", 4)):
        sites[name] = Site(Delta(matrix(model.get_submodule(name))), n_components, generator)
        sites[name].set_pieces(values[f"V_{name}"], values[f"U_{name}"])
        networks[name] = ScalarNetwork(n_components, 3, generator)
    return Decomposition(model, sites, networks)


def recorded_importances() -> tuple[dict[str, Importance], dict[str, Tensor]]:
    """Return importances of the recorded numbers before the sigmoid, and these as leaves."""
    values = recorded("00")
    pre = {name: values[f"pre_{name}"].clone().requires_grad_() for name in "ab"}
    return {name: Importance(lower_leaky(z), upper_leaky(z)) for name, z in pre.items()}, pre
