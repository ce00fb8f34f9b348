"""The fine-tuning loop: rates on paper, what it trains, and the loss that it refuses."""

import itertools

import pytest
import torch

from crosscoders import CorruptData
from diffing.finetuning import Schedule, finetune


@pytest.mark.parametrize(
    "decay, rates",
    [
        # warm-up 1/2, 1, 1, 1 times (4 - step) / 4, peak 8
        ("linear", [4.0, 6.0, 4.0, 2.0]),
        # the same warm-up times (1 + cos(pi step / 4)) / 2: 1, 0.853553, 0.5, 0.146447
        ("cosine", [4.0, 6.828427, 4.0, 1.171573]),
    ],
)
def test_the_rate_rises_over_the_warm_up_and_decays_to_zero(decay: str, rates: list[float]) -> None:
    schedule = Schedule(steps=4, lr=8.0, warmup_steps=2, decay=decay)  # type: ignore[arg-type]
    assert [schedule.rate(step) for step in range(4)] == pytest.approx(rates)
    assert schedule.rate(4) == pytest.approx(0)


def tune(model: torch.nn.Module, target: float, steps: int = 60) -> None:
    x = torch.tensor([[1.0, 2.0]])
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    finetune(
        model, itertools.repeat(x), lambda x: (model(x) - target).square().mean(), optimizer,
        Schedule(steps, 0.1, warmup_steps=0), tokens_per_step=1, name="toy",
    )  # fmt: skip


def test_only_the_weights_of_the_optimizer_move_and_the_loss_falls(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    tune(model, 3.0)
    assert float(model(torch.tensor([[1.0, 2.0]])).detach()) == pytest.approx(3.0, abs=1e-3)
    assert torch.equal(model.bias, before) and not model.training
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20 and lines[-1].startswith("toy  step 0060/60  tokens 0.00M  loss ")


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step() -> None:
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    with pytest.raises(CorruptData, match=r"the loss of toy is inf at step 0\. Lower its peak rate of 0\.1\."):
        tune(model, float("inf"))
    assert torch.equal(model.weight, before)
