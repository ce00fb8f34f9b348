r"""Train a decomposition: warm-up on faithfulness, then one step after the other, to be resumed bit-identically.

    loss = faithfulness  * what the pieces leave out of the change
         + stochastic    * D(random masks, random sites) / reference
         + adversarial   * D(the adversary's masks, all sites) / reference
         + importance    * minimality  +  frequency * frequency term

The adversary ascends `adversary_steps` times, then once more with the gradient of the very loss that trains the pieces,
from before they move. Batches and draws are a function of (seed, step), so pieces, networks, Adam's moments and the
adversary are the whole state.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.errors import CorruptData
from crosscoders.common.progress import Progress, say
from crosscoders.training import checkpoint
from diffing.decomposition.adversary import Adversary, gradients_of
from diffing.decomposition.losses.adversarial import adversarial_reconstruction
from diffing.decomposition.losses.faithfulness import faithfulness, relative_remainder
from diffing.decomposition.losses.frequency import frequency
from diffing.decomposition.losses.minimality import minimality, power, smooth_l0, sums
from diffing.decomposition.losses.reconstruction import Task
from diffing.decomposition.losses.stochastic import stochastic_reconstruction
from diffing.decomposition.model import Decomposition, Importance
from diffing.decomposition.settings import DecompositionConfig

REPORTS, ADVERSARY_WARMUP, ON = 20, 0.025, 0.1
"""Lines of progress in a run; share of it in which the adversary's rate rises; importance from which a piece is on."""


class Problem(NamedTuple):
    """What is decomposed, on which data."""

    decomposition: Decomposition
    task: Task
    batch_of: Callable[[int], Any]
    """Batch of a step, a function of its number alone."""
    positions: tuple[int, ...]
    """Rows and positions of the largest batch."""
    reference: float = 1.0
    """Distances are divided by it: for a fine-tune, the distance of the model with every mask 0."""
    is_relative: bool = False
    """Whether the remainder counts in units of the change, as for a fine-tune."""


def generator_of(seed: int, step: int) -> torch.Generator:
    """Return the random numbers of a step."""
    state = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(state)


def annealed(start: float, end: float, step: int, steps: int) -> float:
    """Return a value on the line from start, at step 0, to end, at step `steps`."""
    return start + (end - start) * min(1.0, step / steps)


def rate(config: DecompositionConfig, step: int) -> float:
    """Return the rate of a step: a cosine from lr to lr_end lr, which the last step has."""
    low = config.lr_end * config.lr
    return low + (config.lr - low) / 2 * (1 + math.cos(math.pi * min(1.0, step / max(1, config.steps - 1))))


def left_out(problem: Problem) -> Float[Tensor, ""]:
    """Return the faithfulness term."""
    sites = problem.decomposition.sites.values()
    remainders = [site.remainder() for site in sites]
    return relative_remainder(remainders, [s.delta for s in sites]) if problem.is_relative else faithfulness(remainders)


def warm_up_(problem: Problem, config: DecompositionConfig) -> None:
    """Fit the pieces to the change alone."""
    pieces, _ = problem.decomposition.pieces_and_networks()
    optimizer = torch.optim.Adam(pieces, lr=config.warmup_lr, fused=True)
    for _ in range(config.warmup_steps):
        optimizer.zero_grad(set_to_none=True)
        left_out(problem).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(problem: Problem, config: DecompositionConfig, out: Path | None = None, save_every: int = 500) -> Adversary:
    """Train the pieces and networks in place; with `out`, keep the state there and go on from what it holds.

    Raises:
        CorruptData: the loss is not finite.
    """
    decomposition = problem.decomposition
    pieces, networks = decomposition.pieces_and_networks()
    optimizer = torch.optim.Adam([*pieces, *networks], lr=config.lr, fused=True)
    adversary = fresh_adversary(problem, config)
    state = checkpoint.load_state(out, decomposition, optimizer) if out else None
    start = state[0] if state else 0
    if state:
        adversary.restore(state[1])
        say(f"go on from step {start}")
    else:
        warm_up_(problem, config)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.cut_log(out / "train.jsonl", start)
    progress = Progress("decompose", total=config.steps, start=start, unit="step")
    for step in range(start, config.steps):
        losses = step_(problem, config, optimizer, adversary, step)
        done = step + 1
        if done % max(1, config.steps // REPORTS) == 0 or done == config.steps:
            _report(out, {"step": done, **losses})
        if out and (done % save_every == 0 or done == config.steps):
            checkpoint.save_state(out, done, decomposition, optimizer, adversary.state())
        progress.update(1)
    progress.close()
    return adversary


def fresh_adversary(problem: Problem, config: DecompositionConfig) -> Adversary:
    """Return sources of U[0, 1] for every row and position of the largest batch."""
    generator = torch.Generator().manual_seed(config.seed)
    return Adversary(
        {
            name: torch.rand((*problem.positions, site.n_components + 1), generator=generator).to(site.V.device)
            for name, site in problem.decomposition.sites.items()
        }
    )


def step_(
    problem: Problem, config: DecompositionConfig, optimizer: torch.optim.Optimizer, adversary: Adversary, step: int
) -> dict[str, float]:
    """Take one step and return its terms, l0 (pieces above ON at a counted position) and gamma or p."""
    decomposition, task, batch = problem.decomposition, problem.task, problem.batch_of(step)
    with torch.no_grad(), decomposition.reading() as inputs:
        target = task.outputs(decomposition.model, batch)
    importances, counted = decomposition.importances(inputs), task.counted(batch)
    losses, width = _importance_terms(problem, config, importances, counted, step)
    losses["faithfulness"] = left_out(problem)
    if config.stochastic:
        losses["stochastic"] = (
            stochastic_reconstruction(decomposition, task, batch, target, importances, generator_of(config.seed, step))
            / problem.reference
        )
    sources: dict[str, Tensor] = {}
    lr = config.adversary_lr * min(1.0, step / max(1.0, ADVERSARY_WARMUP * config.steps))
    if config.adversarial:
        _ascend(problem, config, adversary, lr, (batch, target, importances))
        sources = adversary.on(counted.shape)
        losses["adversarial"] = (
            adversarial_reconstruction(decomposition, task, batch, target, importances, sources) / problem.reference
        )
    total = torch.stack([getattr(config, name) * loss for name, loss in losses.items()]).sum()
    if not math.isfinite(float(total.detach())):
        raise CorruptData(f"the loss is {float(total.detach())} at step {step}. Lower lr, now {config.lr}.")
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    if config.clip is not None:
        torch.nn.utils.clip_grad_norm_(decomposition.pieces_and_networks()[0], config.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate(config, step)
    optimizer.step()
    if sources:
        scale = problem.reference / config.adversarial  # the adversary climbs the distance itself
        adversary.ascend({n: s.grad * scale for n, s in sources.items() if s.grad is not None}, lr)
    l0 = sum(float((of.lower.detach()[counted] > ON).sum()) for of in importances.values()) / int(counted.sum())
    return {"loss": float(total.detach())} | {n: float(v.detach()) for n, v in losses.items()} | {"l0": l0} | width


def _importance_terms(
    problem: Problem, config: DecompositionConfig, importances: dict[str, Importance], counted: Tensor, step: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    if config.penalty == "smooth-l0":
        gamma = annealed(config.gamma_start, config.gamma_end, step, config.steps)
        width, penalties = {"gamma": gamma}, {name: smooth_l0(of.upper, gamma) for name, of in importances.items()}
    else:
        p = annealed(config.p_start, config.p_end, step, config.steps)
        width, penalties = {"p": p}, {name: power(of.upper, p) for name, of in importances.items()}
    totals, n = list(sums(penalties, counted).values()), int(counted.sum())
    reference = config.reference_positions or n
    return {"importance": minimality(totals, n), "frequency": frequency(totals, n, reference)}, width


def _ascend(
    problem: Problem, config: DecompositionConfig, adversary: Adversary, lr: float, of_batch: tuple[Any, Tensor, Any]
) -> None:
    """Move the adversary `adversary_steps` times, with importances and pieces as they are."""
    batch, target, importances = of_batch
    shape = problem.task.counted(batch).shape
    fixed = {name: Importance(*(part.detach() for part in of)) for name, of in importances.items()}
    for _ in range(config.adversary_steps):
        sources = adversary.on(shape)
        loss = adversarial_reconstruction(problem.decomposition, problem.task, batch, target, fixed, sources)
        adversary.ascend(gradients_of(loss, sources), lr)


def _report(out: Path | None, line: dict[str, float]) -> None:
    if out:
        with (out / "train.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    words = (f"{name} {value:.4g}" for name, value in line.items() if name != "step")
    say(f"step {int(line['step']):06d}  {'  '.join(words)}")
