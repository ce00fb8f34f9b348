"""Step 3 of the data flow: a stream of activations -> a run folder with a crosscoder.

`train` opens the run folder, `start` makes the state or restores it, `_take_steps_` is one loop from top to bottom,
`_conclude_` measures the result. Everything that decides the course is in the config, the stream and the state that
`checkpoint` saves. No producer of activations is imported: any `BatchStream` will do.
"""

import contextlib
import itertools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.activations.stream import BatchStream
from crosscoders.common import files
from crosscoders.common.devices import choose_device, choose_products
from crosscoders.common.errors import CorruptData
from crosscoders.common.progress import Progress, say
from crosscoders.common.provenance import environment
from crosscoders.dictionary import selection
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.dictionary.health import complaints, warning
from crosscoders.dictionary.metrics import Evaluation, ReconstructionSums, evaluate
from crosscoders.formats.load import load_crosscoder
from crosscoders.training import checkpoint
from crosscoders.training.calibration import MAX_TOKENS, first_tokens, threshold_for
from crosscoders.training.log import (
    Log,
    eval_line,
    evaluation_rows,
    heldout_columns,
    last_line,
    log_entry,
    metric_columns,
    write_line,
)
from crosscoders.training.objective import StepResult, forward
from crosscoders.training.optimizer import lr_at
from crosscoders.training.settings import TrainConfig
from crosscoders.training.start import State, fill_width, start, stream_identity

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
        inputs = {**(inputs or {}), "stream": stream_identity(config, stream)}
        machine = environment(str(device)) | {"products": str(products).split(".")[1]}
        checkpoint.start_run(out, config, inputs, machine)
        if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
            say(f"{out} is complete already.")
            return load_crosscoder(out)
        state = start(config, stream, out, device)
        _take_steps_(state, config, stream, out, products=products, stop=stop, holdout=holdout, log=log)
        _conclude_(state.model, config, stream, out, holdout=holdout, log=log)
        # config.json is written last and says that the run is complete
        state.model.to("cpu").requires_grad_(False).save(out, provenance=inputs)
        return state.model


def _take_steps_(
    state: State,
    config: TrainConfig,
    stream: BatchStream,
    out: Path,
    *,
    products: torch.dtype,
    stop: list[int],
    holdout: Holdout | None,
    log: Log | None,
) -> None:
    """Run the loop: take the steps that are left, and log, evaluate and save once in a while."""
    model, device = state.model, state.tokens_since_fired.device
    progress = Progress("train", total=config.n_tokens, start=state.step * config.batch_size, unit="tok")
    logged = time.perf_counter(), state.step
    select = selection.WarmSelection()  # saves time only, so it is no part of the state
    for x in stream.batches(state.step, config.n_steps):
        x = model.normalise(x.to(device, non_blocking=True).float())
        dead = state.tokens_since_fired >= config.dead_after_tokens
        k = k_at(config, state.step)
        result = forward(model, config, x, dead=dead, k=k, step=state.step, select=select, products=products)
        loss = torch.stack(list(result.terms.values())).sum()
        _require_finite(loss, result.terms, state.step, out)

        # ---- one optimiser step
        loss.backward()
        state.optimizer.step_(lr_at(config, state.step))
        state.step += 1
        is_last = state.step == config.n_steps

        # ---- counters: dead latents, inference threshold
        state.tokens_since_fired = torch.where(result.n_active > 0, 0, state.tokens_since_fired + len(x))
        if config.crosscoder.activation == "batchtopk" and state.step >= config.threshold_start_step:
            _track_threshold_(model.threshold, result.smallest_active, config.threshold_beta)
        progress.update(len(x))

        # ---- once in a while: log, evaluate, save
        if state.step % config.log_every == 0 or is_last:
            seconds, since = max(time.perf_counter() - logged[0], 1e-9), logged[1]
            rate = {"tokens_per_second": round((state.step - since) * config.batch_size / seconds)}
            write_line(out, step_line(config, model, result, x, dead, state.step) | rate, log)
            logged = time.perf_counter(), state.step
        if holdout and config.eval_every and state.step % config.eval_every == 0 and not is_last:
            write_line(out, eval_line(state.step, _measure_(model, config, holdout)), log)
        if state.step % config.checkpoint_every == 0 or stop or is_last:
            counters = {"tokens_since_fired": state.tokens_since_fired}
            checkpoint.save_state(out, state.step, model, state.optimizer.adam, counters)
        if stop and not is_last:
            raise StopRequested(stop[0], f"stopped on request at step {state.step:,}; run the same command to go on.")
    progress.close()


def _conclude_(
    model: Crosscoder,
    config: TrainConfig,
    stream: BatchStream,
    out: Path,
    *,
    holdout: Holdout | None,
    log: Log | None,
) -> None:
    """Set the inference threshold, write eval.json, and warn of a dictionary that must not be read."""
    if not holdout:
        _calibrate_(model, config, _last_batches(config, stream))
        return
    evaluation = _measure_(model, config, holdout)
    write_line(out, eval_line(config.n_steps, evaluation), log)
    files.write_json(out / "eval.json", {"name": "eval", "rows": evaluation_rows(evaluation), **log_entry(out)})
    reasons = complaints(heldout_columns(evaluation), k=config.crosscoder.k, training=last_line(out))
    if reasons:
        say(warning(reasons))


def _last_batches(config: TrainConfig, stream: BatchStream) -> Iterator[Float[Tensor, "_ n_models d_model"]]:
    """Yield the last batches of training again, as many as calibration reads."""
    n = min(config.n_steps, -(-MAX_TOKENS // config.batch_size))
    return stream.batches(config.n_steps - n, config.n_steps)


def _calibrate_(model: Crosscoder, config: TrainConfig, batches: Iterable[Float[Tensor, "_ n_models d_model"]]) -> None:
    """Set the inference threshold so that L0 equals k on these tokens; BatchTopK only."""
    if config.crosscoder.k is None:
        return
    threshold = threshold_for(model, batches, config.crosscoder.k)
    if threshold is not None:
        model.threshold.fill_(threshold)


def _measure_(model: Crosscoder, config: TrainConfig, holdout: Holdout) -> Evaluation:
    """Calibrate on held-out tokens and evaluate on them; they are read once, as each read may run the models."""
    batches = iter(holdout())
    first = deque(first_tokens(batches) if config.crosscoder.k is not None else ())
    _calibrate_(model, config, first)
    return evaluate(model, itertools.chain((first.popleft() for _ in range(len(first))), batches))


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


def _require_finite(loss: Tensor, terms: dict[str, Tensor], step: int, out: Path) -> None:
    if torch.isfinite(loss):
        return
    bad = next((name for name, value in terms.items() if not torch.isfinite(value)), "sum")
    states = checkpoint.state_folders(out)
    resume = f"The last state is {states[-1]}" if states else "No state was saved yet"
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
