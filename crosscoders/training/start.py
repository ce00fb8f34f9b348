"""What a run of training starts from: the width of its activations, and the state of its last checkpoint or the first
one.

Reading order: `fill_width` and `stream_identity` (what must fit), `start` (the state), `new_model` and
`geometric_median` (of the first step).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.activations.scored import Moments
from crosscoders.activations.stream import BatchStream
from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.training import checkpoint
from crosscoders.training.optimizer import Optimizer
from crosscoders.training.settings import TrainConfig


def fill_width(config: TrainConfig, stream: BatchStream) -> TrainConfig:
    """Return the config with d_model taken from the stream, after checking that both agree."""
    for name, read in (("d_model", stream.d_model), ("n_models", stream.n_models)):
        asked = getattr(config.crosscoder, name)
        if asked is not None and asked != read:
            raise InputError(
                f"the activations have {name} = {read} but the crosscoder config has {asked}. "
                f"Set crosscoder.{name} = {read}."
            )
    if stream.batch_size != config.batch_size:
        raise InputError(
            f"the stream gives batches of {stream.batch_size} but batch_size is {config.batch_size}. Make them equal."
        )
    return replace(config, crosscoder=replace(config.crosscoder, d_model=stream.d_model))


def stream_identity(config: TrainConfig, stream: BatchStream) -> dict[str, Any]:
    """Return what tells apart streams that have no other name, and what a live run goes on with."""
    moments = stream.moments
    norms = {"mean_norm": [str(value) for value in moments.norm]}
    return norms | ({"mean": moments.mean, "square": moments.square} if config.input_norm == "centred" else {})


@dataclass
class State:
    """What changes from step to step; checkpoints hold all of it."""

    model: Crosscoder
    optimizer: Optimizer
    tokens_since_fired: Int[Tensor, " dict_size"]
    step: int


def start(config: TrainConfig, stream: BatchStream, out: Path, device: torch.device) -> State:
    """Return the state of the last checkpoint in `out`, or the first one; lines of later steps leave the log."""
    model = new_model(config, stream).to(device)
    fired = torch.zeros(config.crosscoder.dict_size, dtype=torch.int64, device=device)
    state = State(model, Optimizer(model, config), fired, step=0)
    restored = checkpoint.load_state(out, model, state.optimizer.adam)
    if restored:
        state.step, state.tokens_since_fired = restored[0], restored[1]["tokens_since_fired"].to(device)
        say(f"going on at step {state.step:,} of {config.n_steps:,}")
    elif config.b_dec_init == "geometric_median":
        first = next(iter(stream.batches(0, 1))).to(device).float()
        with torch.no_grad():
            model.b_dec.copy_(geometric_median(model.normalise(first)))
    checkpoint.cut_log(out / "train.jsonl", state.step)
    return state


def new_model(config: TrainConfig, stream: BatchStream) -> Crosscoder:
    """Return a crosscoder at its start, with the scales of its inputs."""
    model = Crosscoder(config.crosscoder)
    model.init_weights_(norm=config.decoder_init_norm, generator=torch.Generator().manual_seed(config.seed))
    moments = stream.moments
    if config.input_norm == "sqrt_d":
        model.input_scale.copy_(stream.d_model**0.5 / torch.tensor(moments.norm))
    elif config.input_norm == "centred":
        spread = moments.spread()
        if min(spread) <= 0:
            raise InputError("the activations do not vary, so they cannot be scaled. Give more tokens.")
        model.input_mean.copy_(torch.tensor(moments.mean))
        model.input_scale.copy_((stream.d_model / torch.tensor(spread)).sqrt())
    elif words := unequal_spread(moments):
        say(words)
    return model


def unequal_spread(moments: Moments) -> str:
    """Return a warning where, without a scale, the models' centred norms differ by more than a fifth; else nothing."""
    norms = [max(square, 0.0) ** 0.5 for square in moments.spread()]
    if len(norms) != 2 or max(norms) <= 1.2 * min(norms):
        return ""
    return (
        f"warning: input_norm is 'none', and the root mean square of ||x - mean x|| is {norms[0]:.4g} in the base "
        f"model and {norms[1]:.4g} in the tuned one, more than a fifth apart: the larger one is rebuilt at the other's "
        "cost, and relative decoder norms of concepts of both leave 0.5. Use --input-norm centred"
    )


def geometric_median(
    x: Float[Tensor, "batch n_models d_model"], n_iterations: int = 100
) -> Float[Tensor, "n_models d_model"]:
    """Run Weiszfeld's iteration for each model; distances count as 1e-6 or more, so a point may equal the guess."""
    guess = x.mean(dim=0)
    for _ in range(n_iterations):
        weight = 1 / (x - guess).norm(dim=2, keepdim=True).clamp_min(1e-6)
        guess = (weight * x).sum(dim=0) / weight.sum(dim=0)
    return guess
