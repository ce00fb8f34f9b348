"""The one loop that tunes small language models in one go: the embedded pair, and the placebos of `diffing null`.

    loss of a batch -> refused unless finite -> rate of the schedule -> gradient norm clipped at 1 -> optimizer step

`Schedule` says how long and at what rate, `finetune` is the loop.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.errors import CorruptData
from crosscoders.common.progress import say

Batch = TypeVar("Batch")
MAX_NORM = 1.0
REPORTS = 20
"""Lines of progress in a run."""


@dataclass(frozen=True)
class Schedule:
    """Length and rate of one run: a linear warm-up, times a decay to zero."""

    steps: int
    lr: float
    """Peak rate."""
    warmup_steps: int
    decay: Literal["cosine", "linear"] = "cosine"

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay == "linear":
            return self.lr * warmup * (self.steps - step) / self.steps
        return self.lr * (warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def finetune(
    model: Any,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Float[Tensor, ""]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    tokens_per_step: int,
    name: str,
) -> None:
    """Train the parameters of `optimizer` in place, one batch a step; the model is in eval mode afterwards.

    loss_of: the loss of the model on a batch, in nats per token. Reported is its mean over about 20 steps.

    Raises:
        CorruptData: the loss is not finite; no step was made with it.
    """
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    model.train()
    started, smoothed = time.monotonic(), math.nan
    for step in range(schedule.steps):
        loss = loss_of(next(batches))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CorruptData(f"the loss of {name} is {value} at step {step}. Lower its peak rate of {schedule.lr}.")
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        smoothed = value if step == 0 else 0.95 * smoothed + 0.05 * value
        if (step + 1) % max(1, schedule.steps // REPORTS) == 0 or step + 1 == schedule.steps:
            tokens = (step + 1) * tokens_per_step
            say(
                f"{name}  step {step + 1:04d}/{schedule.steps}  tokens {tokens / 1e6:.2f}M  loss {smoothed:.3f}  "
                f"tok/s {tokens / (time.monotonic() - started):,.0f}"
            )
    model.eval()
