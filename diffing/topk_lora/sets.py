"""The smallest set of directions without which a behaviour is gone and every other one stays.

`find_set` looks for it on some prompts: directions are scored by the gradient of the target's log odds with respect to
their multipliers, less what the other behaviours would lose; a few are ablated, the rest scored again; when the
behaviour is gone, each direction is put back that is not needed (elimination). `audit` counts on other prompts, with
the upper bound of what a count cannot exclude. `matched` draws random sets that write as much.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.common.statistics import wilson
from diffing.topk_lora.prompts import DECISION_TOKENS, Prompts, given, margins, reply_logits, reply_tokens
from sae_lora.lora.topk import TopKLoRA

LEFT, KEPT = 0.1, 0.9
"""A behaviour is gone at this share of its prompts, and the others stay from that share on."""
STEP, MAX_DIRECTIONS = 2, 64
PER_LABEL = 24
"""Prompts of each label that a gradient is taken on."""


class Audit(NamedTuple):
    """What is left on prompts that the search did not see."""

    left: float
    """Share of the target's prompts whose first DECISION_TOKENS are still given."""
    n: int
    left_high: float
    """Upper end of its 95% interval (Wilson)."""
    kept: float
    """Smallest share of another behaviour's prompts with the whole reply still given."""
    kept_label: str


class Directions:
    """All directions of an adapter in one vector, and the model with some of them ablated."""

    def __init__(self, adapter: TopKLoRA) -> None:
        self.adapter = adapter
        self.sizes = [site.rank for site in adapter.sites.values()]
        self.n = sum(self.sizes)
        self.device = next(adapter.parameters()).device

    def names(self) -> list[tuple[str, int]]:
        """Return site and number of each direction."""
        return [(name, j) for name, site in self.adapter.sites.items() for j in range(site.rank)]

    def multiplied(self, m: Float[Tensor, " directions"]) -> AbstractContextManager[None]:
        """Return a context in which direction i is multiplied with m_i."""
        return self.adapter.multiplied(dict(zip(self.adapter.sites, m.split(self.sizes), strict=True)))

    def without(self, ablated: Int[np.ndarray, " ablated"]) -> Float[Tensor, " directions"]:
        """Return multipliers of 1 but for these, which have 0."""
        m = torch.ones(self.n, device=self.device)
        m[torch.as_tensor(np.asarray(ablated, dtype=np.int64))] = 0
        return m

    @torch.inference_mode()
    def mass(self, model: Any, prompts: Prompts) -> Float[np.ndarray, " directions"]:
        """Return what each direction writes on the predicting tokens of replies, sum of a_j ||s B_j||."""
        sums = {name: torch.zeros(site.rank, dtype=torch.float64) for name, site in self.adapter.sites.items()}
        positions = torch.arange(prompts.ids.shape[1], device=prompts.ids.device)
        inside = (positions >= prompts.starts[:, None] - 1) & (prompts.attention_mask > 0)

        def add(name: str, a: Tensor) -> None:
            if a.shape[:2] == inside.shape:
                sums[name] += a[inside].abs().double().sum(dim=0).cpu()

        with self.adapter.observed({name: functools.partial(add, name) for name in sums}):
            model(input_ids=prompts.ids, attention_mask=prompts.attention_mask, use_cache=False)
        norms = [site.scale * site.W_out.detach().norm(dim=1).double().cpu() for site in self.adapter.sites.values()]
        return torch.cat([total * norm for total, norm in zip(sums.values(), norms, strict=True)]).numpy()


def shares(hits: Bool[np.ndarray, "prompts tokens"], prompts: Prompts, target: str) -> tuple[float, float, str]:
    """Return the share of the target's decisions that are left, the smallest share of another label's replies that are
    kept, and that label."""
    left = float(hits[prompts.of(target), DECISION_TOKENS - 1].mean())
    others = [(float(hits[prompts.of(label), -1].mean()), label) for label in sorted(set(prompts.labels) - {target})]
    return left, *min(others, default=(1.0, ""))


def gradient(
    model: Any, directions: Directions, m: Float[Tensor, " directions"], prompts: Prompts, n_tokens: int
) -> Float[np.ndarray, " directions"]:
    """Return the gradient of the mean log odds of the first reply tokens with respect to the multipliers at m."""
    m = m.clone().requires_grad_()
    with torch.enable_grad(), directions.multiplied(m):
        odds = margins(reply_logits(model, prompts), reply_tokens(prompts))[:, :n_tokens]
        (found,) = torch.autograd.grad(odds.mean(), m)
    return found.cpu().numpy()


def selective_scores(
    model: Any, directions: Directions, m: Float[Tensor, " directions"], prompts: Prompts, target: str
) -> Float[np.ndarray, " directions"]:
    """Return what the target loses without each direction, less what the other labels lose, to first order at m.

    Raises:
        InputError: the objective has no gradient, so that a ranking would be arbitrary.
    """
    scores = gradient(model, directions, m, prompts.take(prompts.of(target)[:PER_LABEL]), DECISION_TOKENS)
    if not np.abs(scores).max() > 0:
        raise InputError(f"the log odds of {target!r} have no gradient, so no direction can be chosen by it.")
    for label in sorted(set(prompts.labels) - {target}):
        of_label = prompts.take(prompts.of(label)[:PER_LABEL])
        scores = scores - gradient(model, directions, m, of_label, reply_tokens(of_label).shape[1]).clip(min=0)
    return scores


def find_set(
    model: Any,
    directions: Directions,
    prompts: Prompts,
    target: str,
    *,
    max_directions: int = MAX_DIRECTIONS,
    step: int = STEP,
) -> Int[np.ndarray, " directions"] | None:
    """Return a set without which at most LEFT of the target's decisions are left on `prompts`, every direction of which
    is needed for that; None where `max_directions` are not enough.

    Raises:
        InputError: no prompt has the label; as `selective_scores`.
    """
    if target not in prompts.labels:
        raise InputError(f"no prompt has the label {target!r}; there are {', '.join(sorted(set(prompts.labels)))}.")
    ablated: list[int] = []
    while True:
        m = directions.without(np.array(ablated, dtype=np.int64))
        scores = selective_scores(model, directions, m, prompts, target)
        scores[ablated] = -np.inf
        ablated += np.argsort(-scores)[:step].tolist()
        if _left(model, directions, np.array(ablated), prompts, target) <= LEFT:
            return _eliminated(model, directions, ablated, prompts, target)
        if len(ablated) >= max_directions:
            return None


def _left(
    model: Any, directions: Directions, ablated: Int[np.ndarray, " ablated"], prompts: Prompts, target: str
) -> float:
    of_target = prompts.take(prompts.of(target))
    with directions.multiplied(directions.without(ablated)):
        return float(given(model, of_target)[:, DECISION_TOKENS - 1].mean())


def _eliminated(
    model: Any, directions: Directions, ablated: list[int], prompts: Prompts, target: str
) -> Int[np.ndarray, " directions"]:
    """Put back, first chosen last, what is not needed."""
    needed = list(ablated)
    for one in reversed(ablated):
        without_one = [other for other in needed if other != one]
        if without_one and _left(model, directions, np.array(without_one), prompts, target) <= LEFT:
            needed = without_one
    return np.array(needed)


def audit(
    model: Any, directions: Directions, ablated: Int[np.ndarray, " ablated"], prompts: Prompts, target: str
) -> Audit:
    """Count what an ablation leaves and keeps on prompts."""
    with directions.multiplied(directions.without(ablated)):
        hits = given(model, prompts)
    left, kept, label = shares(hits, prompts, target)
    n = len(prompts.of(target))
    return Audit(left, n, wilson(round(left * n), n)[1], kept, label)


def matched(
    chosen: Int[np.ndarray, " chosen"], mass: Float[np.ndarray, " directions"], generator: np.random.Generator
) -> Int[np.ndarray, " chosen"]:
    """Return as many other directions at random, each among the 20 that write most nearly as much."""
    free = np.setdiff1d(np.arange(len(mass)), chosen)
    drawn: list[int] = []
    for one in chosen:
        nearest = free[np.argsort(np.abs(mass[free] - mass[one]), kind="stable")[:20]]
        drawn.append(int(generator.choice(nearest)))
        free = free[free != drawn[-1]]
    return np.array(drawn)


@torch.no_grad()
def rotate_(adapter: TopKLoRA, kind: str, generator: torch.Generator) -> None:
    """Write a dense adapter in another basis, `svd` of s B A or a `random` rotation; it computes what it did."""
    for site in adapter.sites.values():
        if site.gate != "none":
            raise InputError(f"a gate stands between A and B of {site.name!r}, so they have one basis only.")
        if kind == "svd":
            q_b, r_b = torch.linalg.qr(site.W_out.T.double())
            q_a, r_a = torch.linalg.qr(site.A.T.double())
            u, s, v = torch.linalg.svd(r_b @ r_a.T)
            root = s.sqrt()
            site.W_out.copy_((q_b @ (u * root)).T)
            site.A.copy_((q_a @ (v.T * root)).T)
        else:
            rotation = torch.linalg.qr(torch.randn(site.rank, site.rank, generator=generator).double())[0]
            site.W_out.copy_(rotation.to(site.W_out) @ site.W_out)
            site.A.copy_(rotation.to(site.A) @ site.A)
