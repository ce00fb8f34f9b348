"""Fit LoRA around frozen dictionaries: a config -> a run folder with an adapter. One loop from top to bottom.

The run folder is that of crosscoder training, with `adapter/` in place of the crosscoder. Dropout is seeded by the step
and batches are a pure function of the plan, so an interrupted run goes on with the same numbers.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosscoders import checkpoint, store
from crosscoders.config import to_dict
from crosscoders.errors import CorruptData
from crosscoders.pair import choose_device
from crosscoders.progress import Progress, say
from crosscoders.provenance import environment
from crosscoders.training import StopRequested, stop_requests
from sae_lora import objective
from sae_lora.adapter import SIDECAR, add_lora, choose_layers, first_layer_after, save_adapter
from sae_lora.config import FitConfig, pair_up
from sae_lora.dictionary import FrozenDictionary
from sae_lora.inputs import Batch, Plan, load_dictionaries, load_model, make_plan
from sae_lora.stored import open_states


def fit(config: FitConfig, out: str | Path) -> Path:
    """Fit an adapter, or go on with an interrupted run in `out`, and return the adapter's folder.

    Raises:
        InputError: anything that the settings, the dictionaries or the data get wrong; `out` holds another run.
        CorruptData: the loss is not finite.
        StopRequested: SIGTERM or SIGINT, after the state was saved.
    """
    out = Path(out)
    plan = make_plan(config, config.model, pair_up(config.dictionary, config.hook_point), config.side)
    layers = choose_layers(config.layers, plan.infos, plan.n_layers)
    device = choose_device(config.device)
    with store.exclusive(out), stop_requests() as stop:
        dictionaries = load_dictionaries(plan, device)
        inputs = {
            "model": {"name": plan.model, "hash": plan.model_hash},
            "dictionaries": {dictionary.hook_point: dictionary.identity() for dictionary in dictionaries},
            "tokens": {"hash": plan.token_hash(), "n": plan.rows.n_scored},
        }
        checkpoint.start_run(out, to_dict(config), inputs, environment(str(device)), "fit")
        if (out / "adapter" / SIDECAR).is_file():
            say(f"{out} is complete already.")
            return out / "adapter"

        # ---- model, optimiser, state
        adapted = add_lora(
            load_model(plan, config, device), layers, rank=config.rank, alpha=config.chosen_alpha(),
            dropout=config.dropout, seed=config.seed,
        )  # fmt: skip
        weights = [weight for weight in adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
        held = nn.ParameterList(weights)
        restored = checkpoint.load_state(out, held, optimizer)
        step = restored[0] if restored else 0
        n_batches = len(plan.rows.batches(config.batch_rows))
        n_steps = config.epochs * n_batches
        n_weights = sum(weight.numel() for weight in weights)
        say(
            f"fit rank {config.rank} on layers {layers[0]} to {layers[-1]} of {plan.model} ({n_weights:,} weights) "
            f"around {', '.join(info.hook_point for info in plan.infos)}: {plan.rows.n_scored:,} tokens in "
            f"{len(plan.rows.offsets) - 1:,} sequences, {config.epochs} epochs, {n_steps:,} steps, to {out}"
            + (f"; going on at step {step:,}" if step else "")
        )
        checkpoint.cut_log(out / "train.jsonl", step)
        prefix = common_prefix(adapted, dictionaries, layers, plan, config, device)
        states = open_states(config, plan, adapted, dictionaries[0], device)

        # ---- the loop
        progress = Progress("fit", total=n_steps, start=step, unit="step")
        sums, since = torch.zeros(2, dtype=torch.float64), time.perf_counter()
        epochs = itertools.chain.from_iterable(plan.batches(config.batch_rows, device) for _ in range(config.epochs))
        for number, batch in enumerate(epochs):
            if number < step:
                continue
            lr = optimizer.param_groups[0]["lr"] = config.lr_at(step, n_steps)
            stored = states.read(step % n_batches, device) if states else None
            total, norm = take_step(
                adapted, dictionaries, batch, plan.keep_ids, config, optimizer, prefix, stored, step, out
            )
            sums += torch.tensor([total, int(batch.attention_mask.sum())], dtype=torch.float64)
            step += 1
            progress.update(1)
            if step % config.log_every == 0 or step == n_steps:
                seconds = time.perf_counter() - since
                line = {
                    "step": step, "kl": float(sums[0] / sums[1]), "grad_norm": norm, "lr": lr,
                    "n_tokens": int(sums[1]), "tokens_per_second": round(float(sums[1]) / seconds),
                }  # fmt: skip
                _write_line(out, line)
                sums, since = torch.zeros(2, dtype=torch.float64), time.perf_counter()
            if step % config.checkpoint_every == 0 or stop or step == n_steps:
                checkpoint.save_state(out, step, held, optimizer)
            if stop and step < n_steps:
                raise StopRequested(stop[0], f"stopped on request at step {step:,}; run the same command to go on.")
        progress.close()
        described = {"model": inputs["model"], "layers": layers, "rank": config.rank, "alpha": config.chosen_alpha()}
        save_adapter(adapted, out / "adapter", dictionaries, plan.keep_ids, described)
        return out / "adapter"


def common_prefix(
    adapted: Any,
    dictionaries: list[FrozenDictionary],
    layers: list[int],
    plan: Plan,
    config: FitConfig,
    device: torch.device,
) -> objective.Prefix | None:
    """The part up to the lowest hook point, if all LoRA comes after it and nothing changes by starting there."""
    lowest = dictionaries[0].hook_point
    if layers[0] < first_layer_after(lowest):
        return None
    prefix = objective.find_prefix(adapted, lowest, next(plan.batches(config.batch_rows, device)))
    if prefix is None:
        say("this architecture gives other logits when it is entered half-way; every pass runs from the bottom.")
    return prefix


def take_step(
    adapted: Any,
    dictionaries: list[FrozenDictionary],
    batch: Batch,
    keep_ids: list[int],
    config: FitConfig,
    optimizer: torch.optim.Optimizer,
    prefix: objective.Prefix | None,
    stored: objective.States | None,
    step: int,
    out: Path,
) -> tuple[float, float]:
    """One optimiser step; the sum of KL and the norm of the gradient before clipping."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout; resuming draws the same
        total = objective.batch_kl(
            adapted, dictionaries, batch, keep_ids, chunk_tokens=config.chunk_tokens, prefix=prefix, stored=stored
        )
        if not torch.isfinite(total):
            raise CorruptData(
                f"the KL is {total.item()} at step {step}. Lower lr, or use --model-dtype float32; states are in {out}."
            )
        optimizer.zero_grad()
        objective.scaled(total, batch, config.loss).backward()
    limit = float("inf") if config.clip_norm is None else config.clip_norm
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = nn.utils.clip_grad_norm_(weights, limit)
    optimizer.step()
    return float(total.detach()), float(norm)


def _write_line(out: Path, line: dict[str, Any]) -> None:
    with (out / "train.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    say(
        f"step {line['step']:06d}  kl {line['kl']:.5f}  grad {line['grad_norm']:.3g}  lr {line['lr']:.1e}  "
        f"tok/s {line['tokens_per_second']:,}"
    )
