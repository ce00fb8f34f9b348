"""What is measured on each toy, for one seed: name -> value and unit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.decompose.scores import column_match, matched, outer, overlap, svd_pieces
from benchmarks.decompose.toys import (
    TMS,
    Planted,
    VectorTask,
    always_on,
    no_effect,
    planted_linear,
    sparse_features,
    train_tms,
)
from diffing.decomposition.build import fresh, whole_weights
from diffing.decomposition.evaluation import Explained, attacked, explained, reference_of
from diffing.decomposition.loop import ON, Problem, generator_of, train
from diffing.decomposition.model import Decomposition
from diffing.decomposition.settings import DecompositionConfig
from diffing.decomposition.similarity import clusters
from diffing.decomposition.sites import Delta, matrix

Values = dict[str, tuple[float | None, str]]
BATCH, HELD_OUT, PROBE, STILL = 512, range(10**6, 10**6 + 4), 0.75, 0.05
"""Inputs of a step; numbers of the held-out batches; size of a single feature that importances are probed with; change
of the output to it, in norm, below which the fine-tune left it as it was."""
PLANTED = DecompositionConfig(
    components=12, network="scalar", hidden=16, steps=5000, lr=3e-3, stochastic=1.0, adversarial=0.0, importance=4e-2,
    frequency=4e-3,
)  # fmt: skip
TOY = DecompositionConfig(
    components=20, network="scalar", hidden=16, steps=5000, lr=1e-3, stochastic=1.0, adversarial=0.0, importance=3e-3,
    frequency=0.0, penalty="power", p_start=1.0, p_end=1.0,
)  # fmt: skip


def _importances(decomposition: Decomposition, x: Tensor) -> dict[str, Float[Tensor, "rows _"]]:
    with torch.no_grad(), decomposition.reading() as inputs:
        decomposition.model(x)
        return {name: of.lower for name, of in decomposition.importances(inputs).items()}


def decomposed(planted: Planted, config: DecompositionConfig) -> tuple[Decomposition, Explained, list[float]]:
    """Return a trained decomposition of a planted change, what it explains, and the adversary's path."""
    task, batch_of = VectorTask(), planted.batch_of(config.seed, BATCH)
    decomposition = fresh(planted.model, planted.deltas, config, is_relative=True)
    held_out = [batch_of(i) for i in HELD_OUT]
    reference = reference_of(decomposition, task, held_out)
    # A change without effect has nothing to be relative to: what it would explain is set to the output's own size.
    scale = reference if reference > 1e-9 else float(planted.model(held_out[0]).square().mean())
    train(Problem(decomposition, task, batch_of, (BATCH,), scale, is_relative=True), config)
    return decomposition, explained(decomposition, task, held_out), attacked(decomposition, task, held_out[0], scale)


def planted_run(seed: int) -> Values:
    """T1: distinct pieces against the planted ones, importances of single features, and SVD."""
    planted = planted_linear(seed)
    decomposition, measured, path = decomposed(planted, _with_seed(PLANTED, seed))
    alive = measured.alive()["change"]
    match = matched(outer(decomposition.sites["change"])[alive], planted.pieces)
    baseline = matched(svd_pieces(planted.pieces.sum(dim=0)), planted.pieces)
    g = _importances(decomposition, PROBE * planted.features)["change"][:, alive]
    n = len(planted.pieces)
    return {
        "cosine": (sum(match.cosines) / n, "mean cosine of distinct picks"),
        "cosine_min": (min(match.cosines), "cosine"),
        "norm_ratio": (sum(match.norm_ratios) / n, "found over planted"),
        "alive": (float(len(alive)), f"pieces, {n} planted"),
        "false": (float((g[n:] > ON).sum()), "features without a behaviour that a piece is on for"),
        "unexplained": (measured.unexplained["rounded"], "share, rounded importances as masks"),
        "adversary": (path[-1], "share, 20 steps of a fresh adversary"),
        "svd.cosine": (sum(baseline.cosines) / n, "mean cosine of distinct picks"),
    }


def no_effect_run(seed: int) -> Values:
    """T4 (i): no piece is alive."""
    _, measured, _ = decomposed(no_effect(seed), _with_seed(PLANTED, seed))
    return {"alive": (float(len(measured.alive()["change"])), "pieces, none is needed")}


def always_on_run(seed: int) -> Values:
    """T4 (ii): three pieces that nearly every input needs, one cluster, the planted space."""
    planted = always_on(seed)
    # An input needs a direction where its part along it is worth more than the price, so the price is low here.
    config = replace(PLANTED, seed=seed, importance=PLANTED.importance / 10, frequency=PLANTED.frequency / 10)
    decomposition, measured, _ = decomposed(planted, config)
    alive = measured.alive()["change"]
    batch = planted.batch_of(seed, BATCH)(HELD_OUT[0])
    g = _importances(decomposition, batch)["change"][:, alive]
    pieces = outer(decomposition.sites["change"])[alive]
    return {
        "alive": (float(len(alive)), "pieces, 3 planted"),
        "on": (float((g > ON).float().mean(dim=0).min()) if alive else 0.0, "share of inputs, of the rarest piece"),
        "clusters": (float(len(set(clusters(g.numpy()).tolist()))), "clusters"),
        "overlap": (overlap(pieces.sum(dim=0), planted.pieces.sum(dim=0), 3) if alive else 0.0,
                    "share of the planted space"),
    }  # fmt: skip


def _with_seed(config: DecompositionConfig, seed: int) -> DecompositionConfig:
    return replace(config, seed=seed)


def _toy_problem(model: TMS, deltas: dict[str, Delta], config: DecompositionConfig, *, is_relative: bool) -> Any:
    n = model.encoder.in_features
    task = VectorTask()

    def batch_of(step: int) -> Tensor:
        return sparse_features(BATCH, n, 0.05, generator_of(config.seed + 1000, step))

    decomposition = fresh(model, deltas, config, is_relative=is_relative)
    held_out = [batch_of(i) for i in HELD_OUT]
    reference = reference_of(decomposition, task, held_out)
    train(Problem(decomposition, task, batch_of, (BATCH,), reference if is_relative else 1.0, is_relative), config)
    path = attacked(decomposition, task, held_out[0], reference, steps=80)
    return decomposition, explained(decomposition, task, held_out), path


def tms_run(seed: int, *, has_identity: bool = False, config: DecompositionConfig = TOY) -> Values:
    """TMS 5-2: a piece for each column of the encoder; with identity, exactly two pieces of it are on (published count:
    those that a single feature of size .75 brings to .9, all others below .1)."""
    config = _with_seed(config, seed)
    model = TMS(5, 2, has_identity=has_identity, generator=torch.Generator().manual_seed(seed))
    train_tms(model, torch.ones(5, dtype=torch.bool), steps=5000, seed=seed)
    names = ["encoder", "middle", "decoder"] if has_identity else ["encoder", "decoder"]
    decomposition, measured, path = _toy_problem(model, whole_weights(model, names), config, is_relative=False)
    alive = measured.alive()
    match = column_match(decomposition.sites["encoder"], alive["encoder"], matrix(model.encoder), list(range(5)))
    values: Values = {
        "cosine": (sum(match.cosines) / 5, "mean cosine over columns, distinct alive picks (MMCS)"),
        "norm_ratio": (sum(match.norm_ratios) / 5, "found over true (ML2R)"),
        "unexplained": (measured.unexplained["rounded"], "share, rounded importances as masks"),
        "adversary": (path[20], "share, 20 steps of a fresh adversary"),
        "adversary_80": (path[80], "share, 80 steps"),
    }
    for name in names:
        values[f"alive.{name}"] = (float(len(alive[name])), "pieces")
    if has_identity:
        g = _importances(decomposition, PROBE * torch.eye(5))["middle"]
        values["identity.on"] = (float((g >= 0.9).any(dim=0).sum()), "pieces that some single feature needs, 2 true")
        values["identity.others"] = (
            float(((g > ON).any(dim=0) & ~(g >= 0.9).any(dim=0)).sum()),
            "pieces above .1 that none needs, 0 true",
        )
        values["identity.always"] = (float((g > 0.9).all(dim=0).sum()), "pieces that every single feature needs")
    return values


def new_features_run(seed: int) -> Values:
    """T2: a toy model of ten features that learned six first and then all; pieces of what changed.

    A feature that is not learned may change too: before, the model wrote what its random start wrote. So a piece counts
    as false where it is on for a single feature, old or new, whose output moved by less than STILL.
    """
    model = TMS(10, 5, has_identity=False, generator=torch.Generator().manual_seed(seed))
    train_tms(model, torch.arange(10) < 6, steps=5000, seed=seed)
    before = {name: matrix(model.get_submodule(name)).clone() for name in ("encoder", "decoder")}
    features = PROBE * torch.eye(10)
    old = model(features)
    train_tms(model, torch.ones(10, dtype=torch.bool), steps=5000, seed=seed + 100)
    deltas = {name: Delta(matrix(model.get_submodule(name)) - weight) for name, weight in before.items()}
    still = (model(features) - old).norm(dim=1) < STILL
    decomposition, measured, _ = _toy_problem(model, deltas, _with_seed(PLANTED, seed), is_relative=True)
    alive = measured.alive()["encoder"]
    n_on = (_importances(decomposition, features)["encoder"][:, alive] > ON).sum(dim=1)
    learned = learned_features(model)
    new, others = ([j for j in range(6, 10) if bool(learned[j]) is is_new] for is_new in (True, False))
    match = column_match(decomposition.sites["encoder"], alive, deltas["encoder"].inner, new) if new else None
    return {
        "learned": (float(len(new)), "new features that the model gives back, of 4"),
        "cosine": (sum(match.cosines) / len(new) if match else None, "mean cosine to the columns of these"),
        "with_one": (float(n_on[new].eq(1).sum()), "learned features with exactly one piece on"),
        "still": (float(still.sum()), f"features whose output moved by less than {STILL}"),
        "false": (float(n_on[still].sum()), "pieces on for one of these"),
        "forgotten": (float(n_on[[j for j in others if not still[j]]].sum()),
                      "pieces on for features that are not learned, whose output moved"),
        "alive": (float(len(alive)), "pieces of the encoder"),
    }  # fmt: skip


def learned_features(model: TMS) -> Bool[Tensor, " features"]:
    """Return which features come back as at least half of what went in."""
    with torch.no_grad():
        return model(torch.eye(model.encoder.in_features)).diagonal() > 0.5


RUNS: dict[str, Callable[[int], Values]] = {
    "planted": planted_run,
    "no-effect": no_effect_run,
    "always-on": always_on_run,
    "tms-5-2": tms_run,
    "tms-5-2-adversarial": lambda seed: tms_run(seed, config=replace(TOY, stochastic=0.5, adversarial=0.5)),
    "tms-5-2-identity": lambda seed: tms_run(seed, has_identity=True),
    "new-features": new_features_run,
}
