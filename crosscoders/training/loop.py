"""Step 3 of the data flow: a stream of activations -> a run folder with a crosscoder.

`train` is one loop from top to bottom; everything that decides its course is in the config, the stream and the state
that `checkpoint` saves. It imports no producer of activations: any `BatchStream` will do.
"""

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.activations.stream import BatchStream
from crosscoders.common import files
from crosscoders.common.devices import choose_device, choose_products
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.progress import Progress, say
from crosscoders.common.provenance import environment
from crosscoders.dictionary import selection
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.dictionary.health import complaints, warning
from crosscoders.dictionary.metrics import ReconstructionSums, evaluate
from crosscoders.formats.load import load_crosscoder
from crosscoders.training import checkpoint
from crosscoders.training.calibration import MAX_TOKENS, threshold_for
from crosscoders.training.log import (
    Log,
    eval_line,
    evaluation_rows,
    heldout_columns,
    last_line,
    metric_columns,
    write_line,
)
from crosscoders.training.objective import StepResult, forward
from crosscoders.training.optimizer import Optimizer, lr_at
from crosscoders.training.settings import TrainConfig

Holdout = Callable[[], Iterable[Float[Tensor, "_ n_models d_model"]]]
"""Makes a fresh pass over the held-out tokens each time it is called."""


class StopRequested(Exception):
    """SIGTERM or SIGINT came; the step was finished and its state saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


def train(
    config: TrainConfig,
    stream: BatchStream,
    out: str | Path,
    *,
    holdout: Holdout | None = None,
    inputs: dict[str, Any] | None = None,
    log: Log | None = None,
) -> Crosscoder:
    """Train a crosscoder, or go on with an interrupted run in `out`, and return it.

    One seed gives one result: on a CPU, bit for bit, interrupted or not. `log` gets every line of train.jsonl too.

    Raises:
        InputError: the stream does not fit the config; `out` holds another run.
        CorruptData: the loss is not finite; the step, the term and the state to resume from are named.
        StopRequested: SIGTERM or SIGINT, after the state was saved.
    """
    out = Path(out)
    config = fill_width(config, stream)
    device = choose_device(config.device)
    products = choose_products(config.products, device)
    with files.exclusive(out), stop_requests() as stop:
        inputs = {**(inputs or {}), "stream": _stream_identity(config, stream)}
        machine = environment(str(device)) | {"products": str(products).split(".")[1]}
        checkpoint.start_run(out, config, inputs, machine)
        if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
            say(f"{out} is complete already.")
            return load_crosscoder(out)

        # ---- model, optimiser, state
        model = _new_model(config, stream).to(device)
        optimizer = Optimizer(model, config)
        tokens_since_fired = torch.zeros(config.crosscoder.dict_size, dtype=torch.int64, device=device)
        step = 0
        restored = checkpoint.load_state(out, model, optimizer.adam)
        if restored:
            step, tokens_since_fired = restored[0], restored[1]["tokens_since_fired"].to(device)
            say(f"going on at step {step:,} of {config.n_steps:,}")
        elif config.b_dec_init == "geometric_median":
            first = next(iter(stream.batches(0))).to(device)
            with torch.no_grad():
                model.b_dec.copy_(geometric_median(model.normalise(first)))
        checkpoint.cut_log(out / "train.jsonl", step)
        progress = Progress("train", total=config.n_tokens, start=step * config.batch_size, unit="tok")
        logged = time.perf_counter(), step
        select = selection.WarmSelection()  # saves time only, so it is no part of the state

        # ---- the loop
        batches = stream.batches(step) if step < config.n_steps else iter(())
        for x in batches:
            x = model.normalise(x.to(device))
            dead = tokens_since_fired >= config.dead_after_tokens
            k = k_at(config, step)
            result = forward(model, config, x, dead=dead, k=k, step=step, select=select, products=products)
            loss = torch.stack(list(result.terms.values())).sum()
            _require_finite(loss, result.terms, step, out)

            # ---- one optimiser step
            loss.backward()
            optimizer.step_(lr_at(config, step))
            step += 1

            # ---- counters: dead latents, inference threshold
            tokens_since_fired = torch.where(result.n_active > 0, 0, tokens_since_fired + len(x))
            if config.crosscoder.activation == "batchtopk" and step >= config.threshold_start_step:
                _track_threshold_(model.threshold, result.smallest_active, config.threshold_beta)
            progress.update(len(x))

            # ---- once in a while: log, evaluate, save
            if step % config.log_every == 0 or step == config.n_steps:
                seconds, since = time.perf_counter() - logged[0], logged[1]
                rate = {"tokens_per_second": round((step - since) * config.batch_size / seconds)}
                write_line(out, step_line(config, model, result, x, dead, step) | rate, log)
                logged = time.perf_counter(), step
            if holdout and config.eval_every and step % config.eval_every == 0 and step < config.n_steps:
                _calibrate_(model, config, holdout())
                write_line(out, eval_line(step, evaluate(model, holdout())), log)
            if step % config.checkpoint_every == 0 or stop or step == config.n_steps:
                counters = {"tokens_since_fired": tokens_since_fired}
                checkpoint.save_state(out, step, model, optimizer.adam, counters)
            if stop and step < config.n_steps:
                raise StopRequested(stop[0], f"stopped on request at step {step:,}; run the same command to go on.")
            if step == config.n_steps:
                break
        progress.close()

        _calibrate_(model, config, holdout() if holdout else _last_batches(config, stream))
        if holdout:
            evaluation = evaluate(model, holdout())
            write_line(out, eval_line(step, evaluation), log)
            files.write_json(out / "eval.json", {"name": "eval", "rows": evaluation_rows(evaluation)})
            reasons = complaints(heldout_columns(evaluation), k=config.crosscoder.k, training=last_line(out))
            if reasons:
                say(warning(reasons))
        # config.json is written last and says that the run is complete
        model.to("cpu").requires_grad_(False).save(out, provenance=inputs)
        return model


def _new_model(config: TrainConfig, stream: BatchStream) -> Crosscoder:
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
    return model


def _stream_identity(config: TrainConfig, stream: BatchStream) -> dict[str, Any]:
    """Return what tells apart streams that have no other name, and what a live run goes on with."""
    moments = stream.moments
    norms = {"mean_norm": [str(value) for value in moments.norm]}
    return norms | ({"mean": moments.mean, "square": moments.square} if config.input_norm == "centred" else {})


def _last_batches(config: TrainConfig, stream: BatchStream) -> Iterator[Float[Tensor, "_ n_models d_model"]]:
    """Yield the last batches of training again, as many as calibration reads."""
    n = min(config.n_steps, -(-MAX_TOKENS // config.batch_size))
    return itertools.islice(stream.batches(config.n_steps - n), n)


def _calibrate_(model: Crosscoder, config: TrainConfig, batches: Iterable[Float[Tensor, "_ n_models d_model"]]) -> None:
    """Set the inference threshold so that L0 equals k on these tokens; BatchTopK only."""
    if config.crosscoder.k is None:
        return
    threshold = threshold_for(model, batches, config.crosscoder.k)
    if threshold is not None:
        model.threshold.fill_(threshold)


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


def k_at(config: TrainConfig, step: int) -> int | None:
    """Return k of a step: linear from k_start to k over k_anneal_steps."""
    k = config.crosscoder.k
    if k is None or config.k_start is None or step >= config.k_anneal_steps:
        return k
    return round(config.k_start + (k - config.k_start) * step / config.k_anneal_steps)


def _track_threshold_(threshold: Tensor, smallest: Float[Tensor, ""], beta: float) -> None:
    """Update the running mean of the smallest active f_j c_j, which starts at the first value seen."""
    if torch.isfinite(smallest):
        threshold.copy_(smallest if threshold < 0 else beta * threshold + (1 - beta) * smallest)


def geometric_median(
    x: Float[Tensor, "batch n_models d_model"], n_iterations: int = 100
) -> Float[Tensor, "n_models d_model"]:
    """Run Weiszfeld's iteration for each model; distances count as 1e-6 or more, so a point may equal the guess."""
    guess = x.mean(dim=0)
    for _ in range(n_iterations):
        weight = 1 / (x - guess).norm(dim=2, keepdim=True).clamp_min(1e-6)
        guess = (weight * x).sum(dim=0) / weight.sum(dim=0)
    return guess


def _require_finite(loss: Tensor, terms: dict[str, Tensor], step: int, out: Path) -> None:
    if torch.isfinite(loss):
        return
    bad = next((name for name, value in terms.items() if not torch.isfinite(value)), "sum")
    states = sorted(path.name for path in out.glob("step-*"))
    resume = f"The last state is {out / states[-1]}" if states else "No state was saved yet"
    raise CorruptData(
        f"loss term {bad!r} is {terms.get(bad, loss).item()} at step {step}. {resume}; lower lr, or check the cache."
    )


def step_line(
    config: TrainConfig,
    model: Crosscoder,
    result: StepResult,
    x: Float[Tensor, "batch n_models d_model"],
    dead: Bool[Tensor, " dict_size"],
    step: int,
) -> dict[str, Any]:
    """Return the metrics of the batch of this step; fve by the same definition as everywhere, over the batch."""
    sums = ReconstructionSums(x.shape[1], x.shape[2], config.crosscoder.dict_size)
    sums.add(x, x - result.err, result.n_active)
    terms = {name: value.item() for name, value in result.terms.items()}
    topk = {"k": k_at(config, step - 1), "threshold": model.threshold.item()}
    return {
        "step": step,
        "tokens": step * config.batch_size,
        "loss": sum(terms.values()),
        **terms,
        **metric_columns(sums.result()),
        "dead": dead.double().mean().item(),
        "lr": lr_at(config, step - 1),
        **(topk if config.crosscoder.activation == "batchtopk" else {}),
    }


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of being interrupted by them; restore the handlers after it."""
    received: list[int] = []
    try:
        previous = {
            number: signal.signal(number, lambda n, _frame: received.append(n))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
    except ValueError:  # not the main thread: signals are somebody else's business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
