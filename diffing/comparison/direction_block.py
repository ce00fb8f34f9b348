r"""Directions: how much of KL(tuned || base) the first n pieces close, and how often replies show what was planted.

    pieces at a hook point      base below, tuned above, n directions or latents exchanged (docs/math.md, "One table")
    pieces of every matrix      the base with rank n of its weight delta, and the tuned model's other tensors

    share closed = 1 - KL(n) / KL(none),     KL(none): of the base's activation, or of the whole base for matrices

Beside each: random directions, or random singular vectors, as many.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.progress import about
from crosscoders.common.results import row
from crosscoders.common.statistics import bootstrap_interval, resample, wilson
from crosscoders.models.pair import ModelPair
from crosscoders.text.chats import Chat
from diffing.baselines.chance import random_directions
from diffing.baselines.directions import Directions, SpanExchange
from diffing.baselines.weight_svd import random_delta, rebuilt_, weight_delta
from diffing.causal.patching import Measured, measure
from diffing.causal.sets import Exchanger, PatchSet
from diffing.comparison.patched_replies import count_shown, own_replies, patched_replies
from diffing.comparison.settings import CompareSettings
from diffing.comparison.truth import Behaviour

DIRECTION = "base_to_tuned"


class Task(NamedTuple):
    """What pieces are measured on."""

    pair: ModelPair
    chats: list[Chat]
    prompts: list[tuple[Behaviour, list[list[int]]]]
    """Prompts of each planted behaviour."""
    settings: CompareSettings
    seed: int

    def every_prompt(self) -> list[list[int]]:
        """Return the prompts of all behaviours, end to end."""
        return [ids for _, prompts in self.prompts for ids in prompts]


def span_rows(task: Task, methods: Sequence[Directions]) -> list[dict[str, Any]]:
    """Return rows directions.<method>[.random].top_<n>.* of directions, all measured in one pass."""
    d_model = methods[0].vectors.shape[1]
    generator = torch.Generator().manual_seed(task.seed)
    most = min(max(task.settings.pieces), d_model)
    vectors: list[Tensor] = []
    sets = [PatchSet("none", "none")]
    for directions in methods:
        sets += _first_sets(directions.method, sum(map(len, vectors)), len(directions.vectors), task.settings.pieces)
        vectors.append(directions.vectors)
    for _ in range(task.settings.random_draws):
        sets += _first_sets("random", sum(map(len, vectors)), most, task.settings.pieces)
        vectors.append(random_directions(most, d_model, generator))
    rows = piece_rows(task, SpanExchange(torch.cat(vectors).to(task.pair.device)), sets)
    rows = [entry for directions in methods for entry in of_method(rows, directions.method, "random")]
    return rows + [
        row(f"directions.{directions.method}.top_{n}.numbers", n, "numbers/token", 1)
        for directions in methods
        for n in task.settings.pieces
        if n <= len(directions.vectors)
    ]


def _first_sets(name: str, start: int, n: int, pieces: list[int]) -> list[PatchSet]:
    return [PatchSet(f"{name}.top_{k}", "latents", tuple(range(start, start + k))) for k in pieces if k <= n]


def of_method(rows: list[dict[str, Any]], method: str, control: str) -> list[dict[str, Any]]:
    """Return the rows of a method and of the control, for the numbers of pieces that the method has, under its name."""
    own = [entry for entry in rows if entry["name"].startswith(f"{method}.")]
    known = {entry["name"].removeprefix(f"{method}.") for entry in own}
    beside = [e for e in rows if e["name"].startswith(f"{control}.") and e["name"].removeprefix(f"{control}.") in known]
    named = [entry | {"name": f"directions.{entry['name']}"} for entry in own]
    return named + [
        entry | {"name": f"directions.{method}.random.{entry['name'].removeprefix(f'{control}.')}"} for entry in beside
    ]


def piece_rows(task: Task, exchange: Exchanger, sets: list[PatchSet]) -> list[dict[str, Any]]:
    """Return rows <set>.{share_closed,<behaviour>} of sets of pieces; draws of one random set share a name."""
    measured = measure(exchange, task.pair, task.chats, {DIRECTION: sets}, batch_rows=task.settings.batch_rows)
    shares = closed_shares(measured[DIRECTION], task.seed)
    rows = []
    for name in dict.fromkeys(patch.name for patch in sets if patch.kind != "none"):
        rows.append(row(f"{name}.share_closed", *shares[name]))
        patch = next(patch for patch in sets if patch.name == name)
        replies = patched_replies(task.pair, exchange, patch, task.every_prompt(), task.settings.max_new_tokens)
        rows += rate_rows(task, name, replies)
    return rows


def rate_rows(task: Task, name: str, replies: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return rows <name>.<behaviour> of the replies to every prompt of a task."""
    rows, start = [], 0
    for behaviour, prompts in task.prompts:
        shown = count_shown(task.pair, behaviour, replies[start : start + len(prompts)])
        rows.append(rate_row(f"{name}.{behaviour.name}", shown, len(prompts)))
        start += len(prompts)
    return rows


def rate_row(name: str, shown: int, n: int) -> dict[str, Any]:
    """Return a share of replies with its Wilson interval."""
    return row(name, shown / n, "share", n, *wilson(shown, n))


def closed_shares(
    measured: Measured, seed: int, reference: Float[Tensor, " documents"] | None = None
) -> dict[str, tuple[float, str, int, float, float]]:
    """Return value, unit, n and 95% interval over documents of the share of KL closed by each set; the mean of the
    draws of a random one.

    reference: KL to close, summed in each document; default: that of the set `none`.
    """
    weights = resample(measured.n_tokens.shape[1], seed)
    sums = measured.kl[0]
    none = sums[measured.names.index("none")] if reference is None else reference.numpy()
    n_tokens = int(measured.n_tokens[0].sum())
    shares = {}
    for name in dict.fromkeys(measured.names):
        draws = [i for i, known in enumerate(measured.names) if known == name]
        values = 1 - weights @ sums[draws].mean(axis=0) / (weights @ none)
        shares[name] = (float(values[0]), "fraction", n_tokens, *bootstrap_interval(values))
    return shares


def weight_rows(task: Task) -> list[dict[str, Any]]:
    """Return rows directions.weight-svd[.random].top_<n>.* of the base with rank n of the weight delta."""
    started, base = time.perf_counter(), task.pair.models[0]
    delta = weight_delta(*task.pair.models)
    drawn = random_delta(delta, torch.Generator().manual_seed(task.seed))
    ranks = [n for n in task.settings.pieces if n <= max(len(f.s) for f in delta.matrices.values())]

    def variants() -> Iterator[tuple[str, Any]]:
        for which, factors in (("weight-svd", delta), ("weight-svd.random", drawn)):
            for rank in ranks:
                with rebuilt_(base, factors, rank) as model:
                    yield f"{which}.top_{rank}", model

    rows = variant_rows(task, base_kl(task), variants())
    for rank in ranks:
        numbers = sum(min(rank, len(factors.s)) for factors in delta.matrices.values())
        rows.append(row(f"directions.weight-svd.top_{rank}.numbers", numbers, "numbers/token", 1))
    rows.append(row("directions.weight-svd.sites", len(delta.matrices), "matrices", 1))
    return [*rows, row("directions.weight-svd.seconds", time.perf_counter() - started, "s", 1)]


def base_kl(task: Task) -> Float[Tensor, " documents"]:
    """Return KL(tuned || base), whole models, summed in each document."""
    measured = _kl_of(task, task.pair.models[0])
    return torch.from_numpy(measured.kl[0][measured.names.index("source_model")])


def variant_rows(
    task: Task, reference: Float[Tensor, " documents"], variants: Iterator[tuple[str, Any]]
) -> list[dict[str, Any]]:
    """Return rows directions.<name>.{share_closed,<behaviour>} of whole models that stand in place of the base.

    variants: name and model, which may be the base itself, changed until the next one is asked for.
    reference: `base_kl`.
    """
    pair = task.pair
    rows = []
    for name, model in variants:
        with about(name):
            closed = closed_shares(_kl_of(task, model), task.seed, reference)["source_model"]
        rows.append(row(f"directions.{name}.share_closed", *closed))
        replies = own_replies(model, pair, task.every_prompt(), task.settings.max_new_tokens)
        rows += rate_rows(task, f"directions.{name}", replies)
    return rows


def _kl_of(task: Task, model: Any) -> Measured:
    """Return the KL of a whole model from the tuned one."""
    pair = ModelPair(task.pair.info, (model, task.pair.models[1]), task.pair.hook_points, task.pair.device)
    exchange = SpanExchange(torch.zeros(1, task.pair.info.d_model))
    sets = {DIRECTION: [PatchSet("none", "none")]}
    return measure(exchange, pair, task.chats, sets, batch_rows=task.settings.batch_rows)[DIRECTION]


def own_rates(task: Task) -> Iterator[dict[str, Any]]:
    """Yield rows behaviour.<model>.<name>: how often base and tuned themselves show each behaviour."""
    for which, model in zip(("base", "tuned"), task.pair.models, strict=True):
        replies = own_replies(model, task.pair, task.every_prompt(), task.settings.max_new_tokens)
        yield from rate_rows(task, f"behaviour.{which}", replies)
