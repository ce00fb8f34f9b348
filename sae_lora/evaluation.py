r"""What a fit closed, and what it cost: {adapter off, on} x {dictionary off, on}, two ablations, intervals.

`measure` runs every cell over the same sequences and keeps sums for each sequence; `rows` divides once and resamples
sequences, all cells together, so that differences are paired. Definitions in docs/math.md, section "SAE LoRA".
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders import metrics
from crosscoders.errors import InputError
from crosscoders.reporting import row
from sae_lora.dictionary import Constant, FrozenDictionary
from sae_lora.inputs import Batch
from sae_lora.objective import logits
from sae_lora.splicing import splice

CELLS = ("plain", "spliced", "adapted", "adapted_spliced", "zero_ablated", "mean_ablated")
"""Adapter and dictionary off; dictionary on; adapter on; both on; the adapter off and a constant in place of x."""
QUANTITIES = ("ce", "kl", "top1")
RESAMPLES = 2000


@dataclass
class Measured:
    """Sums over the scored predictions of each sequence."""

    sums: Float[np.ndarray, "cells quantities sequences"]
    n_tokens: Int[np.ndarray, " sequences"]
    reconstruction: dict[str, metrics.Evaluation]
    """FVE, L0 and dead fraction of each dictionary, by "<hook point>.before" and ".after" (adapter on)."""


def measure(
    model: Any,
    dictionaries: Sequence[FrozenDictionary],
    batches: Callable[[], Iterator[Batch]],
    n_sequences: int,
    keep_ids: Sequence[int],
) -> Measured:
    """Every cell of a PEFT model and its dictionaries, over all batches; `batches` makes a fresh pass.

    The prediction of a token is made a position before it; predictions of BOS and padding are not counted. The
    ablations keep the positions that the splice keeps; the mean is the model's own, over the other positions.
    """
    sums = np.zeros((len(CELLS), len(QUANTITIES), n_sequences))
    n_tokens = np.zeros(n_sequences, dtype=np.int64)
    collected = {
        (d.hook_point, when): metrics.ReconstructionSums(1, d.info.d_model, d.info.dict_size)
        for d in dictionaries
        for when in ("before", "after")
    }

    def collect(when: str) -> Callable[[FrozenDictionary, Tensor, Tensor, Tensor], None]:
        def add(dictionary: FrozenDictionary, x: Tensor, latents: Tensor, x_hat: Tensor) -> None:
            n_active = (latents != 0).sum(dim=0)
            collected[dictionary.hook_point, when].add(x[:, None], x_hat[:, None], n_active)

        return add

    zeros, means = _ablations(model, dictionaries, batches, keep_ids)
    for batch in batches():
        used = batch.scored.clone()
        used[:, 0] = False  # nothing predicts the first token
        n_tokens[batch.numbers] = used.sum(dim=1).cpu().numpy()
        p = None
        for number, cell in enumerate(CELLS):
            with torch.no_grad(), contextlib.ExitStack() as stack:
                if not cell.startswith("adapted"):
                    stack.enter_context(model.disable_adapter())
                put: Sequence[FrozenDictionary] = {"zero_ablated": zeros, "mean_ablated": means}.get(cell, dictionaries)
                if cell not in ("plain", "adapted"):
                    when = {"spliced": "before", "adapted_spliced": "after"}.get(cell)
                    observe = collect(when) if when else None
                    stack.enter_context(splice(model, put, keep_ids=keep_ids, observe=observe))
                q = logits(model, batch)
            p = q if p is None else p
            sums[number][:, batch.numbers] = _of_rows(p, q, batch, used)
    found = {f"{point}.{when}": part.result() for (point, when), part in collected.items()}
    return Measured(sums, n_tokens, found)


def _of_rows(
    p: Float[Tensor, "rows seq vocab"], q: Float[Tensor, "rows seq vocab"], batch: Batch, used: Bool[Tensor, "rows seq"]
) -> Float[np.ndarray, "quantities rows"]:
    """Sums over each sequence, one sequence's probabilities at a time."""
    found = np.zeros((len(QUANTITIES), len(used)))
    for r in range(len(used)):
        wanted = used[r, 1:]
        log_p, log_q = (metrics.log_probs(values[r, :-1][wanted]) for values in (p, q))
        ce = metrics.ce(log_q, batch.ids[r, 1:][wanted])
        same = log_p.argmax(dim=1) == log_q.argmax(dim=1)
        found[:, r] = [float(part.double().sum()) for part in (ce, metrics.kl(log_p, log_q), same)]
    return found


def _ablations(
    model: Any,
    dictionaries: Sequence[FrozenDictionary],
    batches: Callable[[], Iterator[Batch]],
    keep_ids: Sequence[int],
) -> tuple[list[Constant], list[Constant]]:
    totals = {d.hook_point: torch.zeros(d.info.d_model, dtype=torch.float64) for d in dictionaries}
    counts = dict.fromkeys(totals, 0)

    def add(dictionary: FrozenDictionary, x: Tensor, latents: Tensor, x_hat: Tensor) -> None:
        totals[dictionary.hook_point] += x.double().sum(dim=0).cpu()
        counts[dictionary.hook_point] += len(x)

    device = next(model.parameters()).device
    zeros = [Constant(point, torch.zeros(len(total))).to(device) for point, total in totals.items()]
    with torch.no_grad(), model.disable_adapter(), splice(model, zeros, mode="off", keep_ids=keep_ids, observe=add):
        for batch in batches():
            logits(model, batch)
    means = [Constant(point, (total / counts[point]).float()).to(device) for point, total in totals.items()]
    return zeros, means


def rows(measured: Measured, seed: int = 0) -> list[dict[str, Any]]:
    """Rows eval.<quantity>.<cell>, eval.loss_recovered.*, eval.gap_closed, eval.kl_closed, fve and l0, with 95%
    bootstrap intervals over sequences. A ratio whose denominator is not above 0 is left out.

    Raises:
        InputError: no prediction was scored.
    """
    n, n_sequences = int(measured.n_tokens.sum()), len(measured.n_tokens)
    if not n:
        raise InputError("no prediction to measure: every sequence has one token or none. Give longer documents.")
    drawn = np.random.default_rng(seed).multinomial(n_sequences, np.full(n_sequences, 1 / n_sequences), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, n_sequences)), drawn])
    tokens = np.maximum(weights @ measured.n_tokens, 1)
    mean = {
        (quantity, cell): weights @ measured.sums[c, i] / tokens
        for i, quantity in enumerate(QUANTITIES)
        for c, cell in enumerate(CELLS)
    }

    def entry(name: str, values: Float[np.ndarray, " resamples"], unit: str) -> dict[str, Any]:
        low, high = np.percentile(values[1:], [2.5, 97.5]).tolist() if n_sequences > 1 else (None, None)
        return row(f"eval.{name}", float(values[0]), unit, n, low, high)

    found = [row("eval.sequences", n_sequences, "sequences", n_sequences)]
    units = {"ce": "nats/token", "kl": "nats/token", "top1": "fraction"}
    found += [entry(f"{quantity}.{cell}", values, units[quantity]) for (quantity, cell), values in mean.items()]
    ce = {cell: mean["ce", cell] for cell in CELLS}
    found += [entry(f"ce_gap.{cell}", ce[cell] - ce["plain"], "nats/token") for cell in CELLS[1:4]]
    shares = {
        f"loss_recovered.{kind}.{cell}": (ce[f"{kind}_ablated"] - ce[cell], ce[f"{kind}_ablated"] - ce["plain"])
        for kind in ("zero", "mean")
        for cell in ("spliced", "adapted_spliced")
    }
    shares["gap_closed"] = (ce["spliced"] - ce["adapted_spliced"], ce["spliced"] - ce["plain"])
    kl = {cell: mean["kl", cell] for cell in CELLS}
    shares["kl_closed"] = (kl["spliced"] - kl["adapted_spliced"], kl["spliced"])
    for name, (part, whole) in shares.items():
        if (whole > 0).all():
            found.append(entry(name, part / whole, "fraction"))
    for name, part in measured.reconstruction.items():
        found.append(row(f"eval.fve.{name}", part.fve[0], "fraction", part.n_tokens))
        found.append(row(f"eval.l0.{name}", part.l0, "latents/token", part.n_tokens))
    return found


def summary(found: list[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    values = {entry["name"].removeprefix("eval."): entry for entry in found}
    n, n_sequences = values["ce.plain"]["n"], values["sequences"]["value"]
    lines = [f"{n:,} predictions in {n_sequences:,} sequences; 95% intervals over sequences"]
    lines.append(f"  {'':<18}{'CE':>8}   {'CE - plain':<30}{'KL':>8}{'top-1':>8}")
    for cell in CELLS:
        gap = values.get(f"ce_gap.{cell}")
        lines.append(
            f"  {cell:<18}{values[f'ce.{cell}']['value']:>8.4f}   {_interval(gap, '.4f'):<30}"
            f"{values[f'kl.{cell}']['value']:>8.4f}{values[f'top1.{cell}']['value']:>8.3f}"
        )
    for name, shown in values.items():
        if name.startswith(("loss_recovered", "gap_closed", "kl_closed")):
            lines.append(f"  {name:<40}{_interval(shown, '.3f')}")
        if name.startswith(("fve", "l0")):
            lines.append(f"  {name:<40}{shown['value']:.3f}  n {shown['n']:,} tokens")
    return "\n".join(lines)


def _interval(entry: dict[str, Any] | None, form: str) -> str:
    if entry is None:
        return ""
    shown = f"{entry['value']:{form}}"
    return shown if entry["low"] is None else f"{shown} ({entry['low']:{form}} to {entry['high']:{form}})"
