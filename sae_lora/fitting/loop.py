"""Fit LoRA, or another corrector, around frozen dictionaries: a config -> a run folder with an adapter. One loop from
top to bottom.

The run folder is that of crosscoder training, with `adapter/` in place of the crosscoder. Dropout is seeded by the step
and batches are a pure function of the plan, so an interrupted run goes on with the same numbers.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crosscoders.common import files, memory
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import CorruptData
from crosscoders.common.progress import Progress, say
from crosscoders.common.provenance import environment
from crosscoders.models import points, resume
from crosscoders.models.points import first_layer_after
from crosscoders.text.padding import Batch
from crosscoders.training import checkpoint
from crosscoders.training.loop import StopRequested, stop_requests
from sae_lora.dictionaries.controls import with_control
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.fitting import correctors, objective
from sae_lora.fitting.inputs import Plan, load_dictionaries, load_model, make_plan
from sae_lora.fitting.needs import MEND, fit_need
from sae_lora.fitting.settings import FitConfig, pair_up
from sae_lora.fitting.stored import open_states
from sae_lora.lora.adapter import choose_layers
from sae_lora.lora.sidecar import SIDECAR

PLACES = ("model", "dictionary", "data", "store_folder", "tokenizer", "chat_template", "other_model")
"""Settings that say where something is, of which the run records hashes."""


def fit(config: FitConfig, out: str | Path, *, force: bool = False) -> Path:
    """Fit an adapter, or go on with an interrupted run in `out`, and return the adapter's folder.

    force: as in `memory.require`.

    Raises:
        InputError: anything that the settings, the dictionaries or the data get wrong; `out` holds another run.
        CorruptData: the loss is not finite.
        StopRequested: SIGTERM or SIGINT, after the state was saved.
    """
    out = Path(out)
    chosen = pair_up(config.dictionary, config.hook_point)
    plan = make_plan(
        config, config.model, chosen, config.side, foreign=config.foreign_dictionary, other=config.other_model
    )
    layers = choose_layers(config.layers, plan.infos, plan.n_layers) if config.corrector == "lora" else []
    device = choose_device(config.device)
    needed = memory.require([fit_need(config, plan, layers, device)], MEND, force=force)
    with files.exclusive(out), stop_requests() as stop:
        dictionaries = with_control(load_dictionaries(plan, config, device), config.control, config.seed)
        inputs = _identities(plan, dictionaries)
        checkpoint.start_run(out, config, inputs, environment(str(device)), "fit", PLACES)
        if (out / "adapter" / SIDECAR).is_file():
            say(f"{out} is complete already.")
            return out / "adapter"

        # ---- model, optimiser, state
        fitted = correctors.start(config, load_model(plan, config, device), dictionaries, layers)
        optimizer = make_optimizer(fitted, config)
        weights = nn.ParameterList(fitted.weights)
        step, _ = checkpoint.load_state(out, weights, optimizer) or (0, {})
        order = batch_order(len(plan.rows.batches(config.batch_rows)), config.epochs, config.seed)
        n_steps = len(order)
        going_on = f"; going on at step {step:,}" if step else ""
        say(f"{_summary(config, plan, fitted, layers)}, {n_steps:,} steps, to {out}; needs {needed}{going_on}")
        checkpoint.cut_log(out / "train.jsonl", step)
        resume.require_head(fitted.model, next(plan.batches(config.batch_rows, device)))
        prefix = common_prefix(fitted, layers, plan, config, device)
        states = open_states(config, plan, fitted.model, dictionaries[0], device)

        # ---- the loop
        progress, log = Progress("fit", total=n_steps, start=step, unit="step"), _Log(out)
        batches = plan.batches(config.batch_rows, device, order[step:])
        for number, batch in zip(order[step:], batches, strict=True):
            lr = optimizer.param_groups[0]["lr"] = config.lr_at(step, n_steps)
            stored = states.read(number, device) if states else None
            total, norm = take_step(fitted, batch, plan.keep_ids, config, optimizer, prefix, stored, step, out)
            log.add(total, int(batch.attention_mask.sum()))
            step += 1
            progress.update(1)
            if step % config.log_every == 0 or step == n_steps:
                log.write(step, norm, lr)
            if step % config.checkpoint_every == 0 or stop or step == n_steps:
                checkpoint.save_state(out, step, weights, optimizer)
            if stop and step < n_steps:
                raise StopRequested(stop[0], f"stopped on request at step {step:,}; run the same command to go on.")
        progress.close()
        description = _description(config, plan, inputs, layers)
        correctors.save(fitted, out / "adapter", dictionaries, plan.keep_ids, description)
        return out / "adapter"


def _identities(plan: Plan, dictionaries: list[FrozenDictionary]) -> dict[str, Any]:
    """Return what a run goes on with only where it is the same: model, dictionaries and tokens."""
    return {
        "model": {"name": plan.model, "hash": plan.model_hash},
        "dictionaries": {dictionary.hook_point: dictionary.identity() for dictionary in dictionaries},
        "tokens": {"hash": plan.token_hash(), "n": plan.rows.n_scored},
    }


def _description(config: FitConfig, plan: Plan, inputs: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """Return what the adapter's sidecar says of the fit, beside its dictionaries."""
    description = {
        "model": inputs["model"], "tokens": inputs["tokens"], "corrector": config.corrector,
        "foreign_dictionary": config.foreign_dictionary, "other_model": plan.other,
    }  # fmt: skip
    if layers:
        description |= {"layers": layers, "rank": config.rank, "alpha": config.chosen_alpha()}
    return description


def batch_order(n_batches: int, epochs: int, seed: int) -> list[int]:
    """Return the numbers of the batches of all epochs: the plan's order first, then permutations by seed and epoch."""
    others = (np.random.default_rng([seed, epoch]).permutation(n_batches).tolist() for epoch in range(1, epochs))
    return list(itertools.chain(range(n_batches), *others))


def _summary(config: FitConfig, plan: Plan, fitted: correctors.Fitted, layers: list[int]) -> str:
    """Say what is fitted, around what, on how much; for people."""
    kind = f"rank {config.rank} on layers {layers[0]} to {layers[-1]}" if layers else config.corrector
    read_at = ", ".join(info.hook_point for info in plan.infos)
    control = "" if config.control == "none" else f", control {config.control}"
    often = f" {config.epochs} times" if config.epochs > 1 else ""
    return (
        f"fit {kind} of {plan.model} ({fitted.n_weights:,} weights) around {read_at}{control}: "
        f"{plan.rows.n_scored:,} tokens in {len(plan.rows.offsets) - 1:,} sequences{often}"
    )


class _Log:
    """Means over the steps since the last line of train.jsonl."""

    def __init__(self, out: Path) -> None:
        self.path, self.kl, self.n_tokens, self.since = out / "train.jsonl", 0.0, 0, time.perf_counter()

    def add(self, kl: float, n_tokens: int) -> None:
        self.kl, self.n_tokens = self.kl + kl, self.n_tokens + n_tokens

    def write(self, step: int, grad_norm: float, lr: float) -> None:
        """Write a line in the file and one for people."""
        kl, rate = self.kl / self.n_tokens, round(self.n_tokens / max(time.perf_counter() - self.since, 1e-9))
        line = {"step": step, "kl": kl, "grad_norm": grad_norm, "lr": lr, "n_tokens": self.n_tokens}
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"tokens_per_second": rate}) + "\n")
        say(f"step {step:06d}  kl {kl:.5f}  grad {grad_norm:.3g}  lr {lr:.1e}  tok/s {rate:,}")
        self.kl, self.n_tokens, self.since = 0.0, 0, time.perf_counter()


def make_optimizer(fitted: correctors.Fitted, config: FitConfig) -> torch.optim.Optimizer:
    """Make AdamW; without decay for corrector sae, as the others are at 0 where nothing changes."""
    decay = 0.0 if config.corrector == "sae" else config.weight_decay
    return torch.optim.AdamW(fitted.weights, lr=config.lr, weight_decay=decay, fused=True)


def common_prefix(
    fitted: correctors.Fitted,
    layers: list[int],
    plan: Plan,
    config: FitConfig,
    device: torch.device,
) -> resume.Prefix | None:
    """Return the part up to the residual-stream point at or before the lowest dictionary, if all LoRA comes after it
    and nothing changes by starting there."""
    lowest = points.entry_point(fitted.dictionaries[0].hook_point)
    if layers and layers[0] < first_layer_after(lowest):
        return None
    prefix = resume.find_prefix(fitted.model, lowest, next(plan.batches(config.batch_rows, device)))
    if prefix is None:
        say("this architecture gives other logits when it is entered half-way; every pass runs from the bottom.")
    return prefix


def take_step(
    fitted: correctors.Fitted,
    batch: Batch,
    keep_ids: list[int],
    config: FitConfig,
    optimizer: torch.optim.Optimizer,
    prefix: resume.Prefix | None,
    stored: objective.States | None,
    step: int,
    out: Path,
) -> tuple[float, float]:
    """Take one optimiser step; return the sum of KL and the norm of the gradient before clipping."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout; resuming draws the same
        total = objective.batch_kl(
            fitted.model,
            fitted.dictionaries,
            batch,
            keep_ids,
            chunk_tokens=config.chosen_chunk(batch.ids.device.type),
            prefix=prefix,
            stored=stored,
        )
        if not torch.isfinite(total):
            raise CorruptData(
                f"the KL is {total.item()} at step {step}. Lower lr, or use --model-dtype float32; states are in {out}."
            )
        optimizer.zero_grad()
        objective.scaled(total, batch, config.loss).backward()
    limit = float("inf") if config.clip_norm is None else config.clip_norm
    norm = nn.utils.clip_grad_norm_(fitted.weights, limit)
    optimizer.step()
    return float(total.detach()), float(norm)
