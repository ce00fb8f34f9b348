"""What needs a CUDA device; run with `-m gpu` on one."""

import pytest
import torch

from crosscoders import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoders.dictionary import selection
from crosscoders.training.objective import forward
from crosscoders.training.optimizer import Optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def trajectory(device: str, activation: str, products: torch.dtype) -> list[torch.Tensor]:
    """Weights after 20 steps."""
    is_relu = activation == "relu"
    shape = CrosscoderConfig(dict_size=256, d_model=48, activation=activation, k=None if is_relu else 8)  # type: ignore[arg-type]
    config = TrainConfig(
        crosscoder=shape, n_tokens=256_000, batch_size=128, aux_coefficient=0.0 if is_relu else 1 / 32,
        l1_coefficient=0.01 if is_relu else 0.0,
    )  # fmt: skip
    model = Crosscoder(shape)
    model.init_weights_(norm=0.3, generator=torch.Generator().manual_seed(0))
    model.to(device)
    optimizer, select = Optimizer(model, config), selection.WarmSelection()
    dead = (torch.arange(256) < (0 if is_relu else 64)).to(device)
    for step in range(20):
        x = torch.randn(128, 2, 48, generator=torch.Generator().manual_seed(step)).to(device)
        result = forward(model, config, x, dead=dead, k=shape.k, step=step, select=select, products=products)
        torch.stack(list(result.terms.values())).sum().backward()
        optimizer.step_(1e-3)
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("activation", ["batchtopk", "relu"])
def test_twenty_steps_on_a_gpu_are_those_of_a_cpu(activation: str) -> None:
    here, there = (trajectory(device, activation, torch.float32) for device in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm()


@pytest.mark.parametrize("activation", ["batchtopk", "relu"])
def test_bfloat16_products_stay_near(activation: str) -> None:
    exact, rough = (trajectory("cuda", activation, products) for products in (torch.float32, torch.bfloat16))
    for a, b in zip(exact[:3:2], rough[:3:2], strict=True):  # the weights; biases are small and start at 0
        assert (a - b).norm() <= 0.05 * a.norm()
