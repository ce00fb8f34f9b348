"""Our training step against the encoder's matrix product alone and against a dense autograd step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.throughput import memory
from benchmarks.throughput.steps import (
    SHAPES,
    Shape,
    dense_step,
    encoder_product,
    our_step,
    planted,
    rate_row,
    require_close,
    start_model,
    turns,
)
from benchmarks.timing import interleaved, median_row, ratio_row
from crosscoders import CrosscoderConfig, TrainConfig

TRAINED = 0.04
"""Share of active latents of an L1 crosscoder in training, after its first fifth of the steps (docs/performance.md)."""


def compare(
    name: str,
    config: TrainConfig,
    shape: Shape,
    *,
    dead_share: float = 0.0,
    active_share: float | None = None,
    n_rounds: int,
) -> dict[str, list[float]]:
    """Measure CPU seconds of the encoder's product, our step and the dense one, once their losses were seen to agree.

    active_share: with biases at which each latent is active on that share of the first batch.
    """
    batches = planted(shape)
    dead = torch.rand(shape.dict_size, generator=torch.Generator().manual_seed(1)) < dead_share
    models = [start_model(config.crosscoder) for _ in range(2)]
    if active_share is not None:
        cut = encoder_product(models[0], batches[0]).quantile(1 - active_share, dim=0)
        for model in models:
            model.b_enc.data.copy_(-cut)
    ours, dense = our_step(models[0], config, dead), dense_step(models[1], config, dead)
    require_close(name, ours, dense, batches, 1e-4)
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: encoder_product(models[0], batches[0]),
        "ours": turns(ours, batches),
        "dense": turns(dense, batches),
    }
    return interleaved(parts, n_rounds=n_rounds)


def step_rows(shape: Shape, *, dead_share: float = 0.0, n_rounds: int) -> list[dict[str, Any]]:
    """Time BatchTopK; with `dead_share`, that share of the latents takes part in the auxiliary term."""
    name = f"throughput.step.{shape}" + (".aux" if dead_share else "")
    seconds = compare(name, shape.config(), shape, dead_share=dead_share, n_rounds=n_rounds)
    return [
        ratio_row(f"{name}.ratio_to_encode", seconds["ours"], seconds["encode"], "encoder products"),
        ratio_row(f"{name}.speedup_over_dense", seconds["dense"], seconds["ours"], "times"),
        rate_row(name, shape, seconds["ours"]),
        median_row(
            f"{name}.encode.gflop_per_second", [encode_flops(shape) / s / 1e9 for s in seconds["encode"]], "GFLOP/s"
        ),
    ]


def encode_flops(shape: Shape) -> int:
    """Return the floating-point operations of one encoder product."""
    return 2 * shape.batch * shape.n_models * shape.d_model * shape.dict_size


def relu_rows(shape: Shape, *, active_share: float | None = None, n_rounds: int) -> list[dict[str, Any]]:
    """Time L1 while latents are dense, as at the start; with `active_share`, when so few are active.

    Five dense products are the least that a dense step needs: forward 2, decoder backward 2, encoder backward 1.
    """
    name = f"throughput.step.{shape.d_model}x{shape.dict_size}x{shape.batch}.l1"
    name += "" if active_share is None else f".active_{active_share:.0%}".replace("%", "_percent")
    relu = CrosscoderConfig(dict_size=shape.dict_size, activation="relu", d_model=shape.d_model)
    config = replace(shape.config(), crosscoder=relu, threshold_start_step=0, l1_coefficient=0.01)
    seconds = compare(name, config, shape, active_share=active_share, n_rounds=n_rounds)
    floor = [5 * value for value in seconds["encode"]]
    return [
        ratio_row(f"{name}.share_of_dense_roof", floor, seconds["ours"], "fraction"),
        ratio_row(f"{name}.speedup_over_dense", seconds["dense"], seconds["ours"], "times"),
        rate_row(name, shape, seconds["ours"]),
    ]


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the rows `throughput.step.*` of our own implementations."""
    measured, n_rounds = [], 3 if quick else 9
    for shape in SHAPES[: 1 if quick else None]:
        for dead_share in (0.0, 0.3):
            measured += step_rows(shape, dead_share=dead_share, n_rounds=n_rounds)
        measured += relu_rows(shape, n_rounds=n_rounds) + relu_rows(shape, active_share=TRAINED, n_rounds=n_rounds)
        measured += memory.rows(shape, ("ours", "dense"), 1 if quick else 3)
    return measured
