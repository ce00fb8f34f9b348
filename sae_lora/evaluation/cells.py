r"""What a fit closed, and what it cost: {adapter off, on} x {dictionary off, on}, two ablations, intervals.

`measure` runs every cell over the same sequences and keeps sums for each sequence, of all predictions and of those of
each class; `eval_rows` divides once and resamples sequences, the same for all cells, classes and runs, so that
differences are paired. Definitions in docs/math.md, section "SAE LoRA".
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.common.progress import watched
from crosscoders.common.results import row
from crosscoders.common.statistics import bootstrap_interval, resample
from crosscoders.dictionary import metrics
from crosscoders.models import predictions
from crosscoders.models.resume import ToLogits, final_states, head_alone, require_head
from crosscoders.text.padding import Batch
from sae_lora.dictionaries.frozen import Constant, FrozenDictionary
from sae_lora.evaluation.classes import Classes
from sae_lora.lora.adapter import lora_off
from sae_lora.splicing import splice

CELLS = ("plain", "spliced", "adapted", "adapted_spliced", "zero_ablated", "mean_ablated")
"""Adapter and dictionary off; dictionary on; adapter on; both on; the adapter off and a constant in place of x."""
QUANTITIES = ("ce", "kl", "top1")
UNITS = {"ce": "nats/token", "kl": "nats/token", "top1": "fraction"}


Observer = Callable[[FrozenDictionary, Tensor, Tensor, Tensor], None]
"""Gets a dictionary, x, latents and x_hat."""


class Sums(NamedTuple):
    """Over the predictions of each sequence, or over those of one class."""

    sums: Float[np.ndarray, "cells quantities sequences"]
    n_tokens: Int[np.ndarray, " sequences"]


@dataclass
class Measured:
    """Sums over the scored predictions of each sequence."""

    sums: Float[np.ndarray, "cells quantities sequences"]
    n_tokens: Int[np.ndarray, " sequences"]
    reconstruction: dict[str, metrics.Evaluation]
    """FVE, L0 and dead fraction of each dictionary, by "<hook point>.before" and ".after" (adapter on)."""
    n_active: dict[str, Int[Tensor, " dict_size"]] = field(default_factory=dict)
    """Tokens on which each latent is active, by the same names."""
    classes: dict[str, Sums] = field(default_factory=dict)


def measure(
    model: Any,
    dictionaries: Sequence[FrozenDictionary],
    batches: Callable[[], Iterator[Batch]],
    n_sequences: int,
    keep_ids: Sequence[int],
    *,
    corrected: Sequence[FrozenDictionary] | None = None,
    classes: Classes | None = None,
    cells: Sequence[str] = CELLS,
    label: str = "eval",
) -> Measured:
    """Measure every cell of a model, under PEFT or not, and its dictionaries; `batches` makes a fresh pass.

    corrected: what is spliced while the adapter is on, for correctors of the dictionary. cells: fewer of `CELLS`, from
    `plain` on.
    label: names the passes in progress.
    The prediction of a token is made a position before it; predictions of BOS and padding are not counted. The
    ablations keep the positions that the splice keeps; the mean is the model's own, over the other positions.
    """
    names = ["", *(classes.names if classes else [])]
    sums = np.zeros((len(names), len(cells), len(QUANTITIES), n_sequences))
    n_tokens = np.zeros((len(names), n_sequences), dtype=np.int64)
    reconstructions = {when: _Reconstructions(dictionaries) for when in ("before", "after")}
    ablated = any(cell.endswith("_ablated") for cell in cells)

    def passed(label: str) -> Iterator[Batch]:
        return watched(batches(), label, total=n_sequences, unit="seq", size=lambda batch: len(batch.ids))

    zeros, means = _ablations(model, dictionaries, passed(f"{label}, means"), keep_ids) if ablated else ([], [])
    spliced: dict[str, Sequence[FrozenDictionary]] = {
        "spliced": dictionaries, "adapted_spliced": corrected or dictionaries, "zero_ablated": zeros,
        "mean_ablated": means,
    }  # fmt: skip
    observers = {"spliced": reconstructions["before"].add, "adapted_spliced": reconstructions["after"].add}
    for batch in passed(label):
        if not n_tokens.any():
            require_head(model, batch)
        used = batch.scored.clone()
        used[:, 0] = False  # nothing predicts the first token
        masks = [used, *(classes.of(batch, used).values() if classes else [])]
        n_tokens[:, batch.numbers] = [mask.sum(dim=1).cpu().numpy() for mask in masks]
        finals = [
            _cell_states(model, cell, spliced.get(cell, ()), batch, keep_ids, observers.get(cell)) for cell in cells
        ]
        with torch.no_grad(), head_alone(model) as to_logits:
            for r, number in enumerate(batch.numbers):
                wanted = used[r, 1:]
                each = of_predictions(to_logits, [x[r, :-1][wanted] for x in finals], batch.ids[r, 1:][wanted])
                marked = torch.stack([mask[r, 1:][wanted] for mask in masks]).double()
                sums[..., number] = (each @ marked.T).permute(2, 0, 1).cpu().numpy()
    parts = {
        f"{d.hook_point}.{when}": reconstructions[when].sums[d.hook_point]
        for d in dictionaries
        for when in reconstructions
    }
    of_classes = {name: Sums(*part) for name, *part in zip(names[1:], sums[1:], n_tokens[1:], strict=True)}
    reconstruction = {name: part.result() for name, part in parts.items()}
    n_active = {name: part.n_active for name, part in parts.items()}
    return Measured(sums[0], n_tokens[0], reconstruction, n_active, of_classes)


class _Reconstructions:
    """Sums over what dictionaries make of the activations of one cell, by hook point."""

    def __init__(self, dictionaries: Sequence[FrozenDictionary]) -> None:
        self.sums = {
            d.hook_point: metrics.ReconstructionSums(1, d.info.d_model, d.info.dict_size) for d in dictionaries
        }

    def add(self, dictionary: FrozenDictionary, x: Tensor, latents: Tensor, x_hat: Tensor) -> None:
        """Add a batch, as an `Observer`."""
        self.sums[dictionary.hook_point].add(x[:, None], x_hat[:, None], (latents != 0).sum(dim=0))


def _cell_states(
    model: Any,
    cell: str,
    spliced: Sequence[FrozenDictionary],
    batch: Batch,
    keep_ids: Sequence[int],
    observe: Observer | None,
) -> Tensor:
    """Return the final hidden states of one cell; nothing is spliced into the plain and the adapted one."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if not cell.startswith("adapted"):
            stack.enter_context(lora_off(model))
        if spliced:
            stack.enter_context(splice(model, spliced, keep_ids=keep_ids, observe=observe))
        return final_states(model, batch)


def of_predictions(
    to_logits: ToLogits, finals: Sequence[Float[Tensor, "predictions d_model"]], ids: Int[Tensor, " predictions"]
) -> Float[Tensor, "cells quantities predictions"]:
    """Return CE, KL to the first cell and agreement with its best token, from what the head reads in each cell.

    ids: the tokens that are predicted.
    """
    log_p = predictions.log_probs(to_logits(finals[0]))
    quantities = []
    for number, final in enumerate(finals):
        log_q = predictions.log_probs(to_logits(final)) if number else log_p
        same = log_p.argmax(dim=1) == log_q.argmax(dim=1)
        each = (predictions.ce(log_q, ids), predictions.kl(log_p, log_q), same)
        quantities.append(torch.stack([values.double() for values in each]))
    return torch.stack(quantities)


def _ablations(
    model: Any,
    dictionaries: Sequence[FrozenDictionary],
    batches: Iterator[Batch],
    keep_ids: Sequence[int],
) -> tuple[list[Constant], list[Constant]]:
    totals = {d.hook_point: torch.zeros(d.info.d_model, dtype=torch.float64) for d in dictionaries}
    counts = dict.fromkeys(totals, 0)

    def add(dictionary: FrozenDictionary, x: Tensor, latents: Tensor, x_hat: Tensor) -> None:
        totals[dictionary.hook_point] += x.double().sum(dim=0).cpu()
        counts[dictionary.hook_point] += len(x)

    device = next(model.parameters()).device
    zeros = [Constant(point, torch.zeros(len(total))).to(device) for point, total in totals.items()]
    with torch.no_grad(), lora_off(model), splice(model, zeros, mode="off", keep_ids=keep_ids, observe=add):
        for batch in batches:
            final_states(model, batch)
    means = [Constant(point, (total / counts[point]).float()).to(device) for point, total in totals.items()]
    return zeros, means


class Means:
    """Means of one set of predictions: [0] is the estimate, the others are resamples of sequences."""

    def __init__(
        self,
        sums: Float[np.ndarray, "cells quantities sequences"],
        n_tokens: Int[np.ndarray, " sequences"],
        weights: Float[np.ndarray, "resamples sequences"],
    ) -> None:
        self.n = int(n_tokens.sum())
        self.has_interval = len(n_tokens) > 1
        tokens = np.maximum(weights @ n_tokens, 1)
        means = np.einsum("rs,cqs->qcr", weights, sums) / tokens
        self.ce, self.kl, self.top1 = (dict(zip(CELLS, part, strict=True)) for part in means)

    def entry(self, name: str, values: Float[np.ndarray, " resamples"], unit: str) -> dict[str, Any]:
        low, high = bootstrap_interval(values) if self.has_interval else (None, None)
        return row(name, float(values[0]), unit, self.n, low, high)

    def gap(self, cell: str) -> Float[np.ndarray, " resamples"]:
        """Return CE above that of the plain model."""
        return self.ce[cell] - self.ce["plain"]

    def shares(self) -> dict[str, Float[np.ndarray, " resamples"]]:
        """Return gap_closed and kl_closed, where their denominators are above 0."""
        parts = {
            "gap_closed": (self.ce["spliced"] - self.ce["adapted_spliced"], self.gap("spliced")),
            "kl_closed": (self.kl["spliced"] - self.kl["adapted_spliced"], self.kl["spliced"]),
        }
        return {name: part / whole for name, (part, whole) in parts.items() if (whole > 0).all()}

    def recovered(self) -> dict[str, Float[np.ndarray, " resamples"]]:
        """Return loss_recovered.<ablation>.<cell>, under the same condition."""
        shares = {}
        for kind in ("zero", "mean"):
            whole = self.gap(f"{kind}_ablated")
            if (whole > 0).all():
                for cell in ("spliced", "adapted_spliced"):
                    shares[f"loss_recovered.{kind}.{cell}"] = (whole - self.gap(cell)) / whole
        return shares


def eval_rows(measured: Measured, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows eval.<quantity>.<cell>, eval.ce_gap.*, eval.loss_recovered.*, eval.gap_closed, eval.kl_closed, the
    same for each class of predictions, fve and l0. A share whose denominator is not above 0 is left out.

    Raises:
        InputError: no prediction was scored.
    """
    n_sequences = len(measured.n_tokens)
    if not measured.n_tokens.sum():
        raise InputError("no prediction to measure: every sequence has one token or none. Give longer documents.")
    weights = resample(n_sequences, seed)
    means = Means(measured.sums, measured.n_tokens, weights)
    entries = [row("eval.sequences", n_sequences, "sequences", n_sequences)]
    for quantity in QUANTITIES:
        of_cells = getattr(means, quantity)
        entries += [means.entry(f"eval.{quantity}.{cell}", of_cells[cell], UNITS[quantity]) for cell in CELLS]
    entries += [means.entry(f"eval.ce_gap.{cell}", means.gap(cell), "nats/token") for cell in CELLS[1:4]]
    shares = means.recovered() | means.shares()
    entries += [means.entry(f"eval.{name}", values, "fraction") for name, values in shares.items()]
    for name, part in measured.reconstruction.items():
        entries.append(row(f"eval.fve.{name}", part.fve[0], "fraction", part.n_tokens))
        entries.append(row(f"eval.l0.{name}", part.l0, "latents/token", part.n_tokens))
    for name, (sums, n_tokens) in measured.classes.items():
        if n_tokens.any():
            entries += _class_rows(f"eval.{name}", Means(sums, n_tokens, weights))
    return entries


def _class_rows(place: str, means: Means) -> list[dict[str, Any]]:
    entries = [means.entry(f"{place}.ce.plain", means.ce["plain"], "nats/token")]
    entries += [means.entry(f"{place}.ce_gap.{cell}", means.gap(cell), "nats/token") for cell in CELLS[1:4]]
    entries += [means.entry(f"{place}.kl.{cell}", means.kl[cell], "nats/token") for cell in CELLS[1:4]]
    return entries + [means.entry(f"{place}.{name}", values, "fraction") for name, values in means.shares().items()]
