"""What each piece of a fine-tune does on held-out tokens: how important, where, for which documents, to which end.

`read_pieces` runs the tuned model once over the held-out batches and returns a row per alive piece; `read_effects`
switches single pieces off and says what that does to the predictions where they are important and where they are not.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.models.predictions import kl, log_probs
from crosscoders.text.padding import Batch
from diffing.decomposition.curves import masks_with
from diffing.decomposition.evaluation import Explained, looked_at
from diffing.decomposition.language import LanguageTask
from diffing.decomposition.loop import ON
from diffing.decomposition.model import Decomposition
from diffing.topk_lora.distil import Setting, logits_at, predicted
from diffing.topk_lora.readouts import context_of

TOP_TOKENS, NEEDED, IDLE = 5, 0.5, 0.1
"""Tokens that are named; importances above which a piece counts as needed, and below which as not."""


class Reading(NamedTuple):
    """Importances of the alive pieces over the held-out tokens."""

    pieces: list[tuple[str, int]]
    importances: Float[np.ndarray, "tokens pieces"]
    activations: Float[np.ndarray, "tokens pieces"]
    """v_c . x times the norm of u_c, with the sign that makes its mean where the piece is important positive."""
    ids: Int[np.ndarray, " tokens"]
    documents: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, " tokens"]


@torch.no_grad()
def read_importances(setting: Setting, decomposition: Decomposition, alive: dict[str, list[int]]) -> Reading:
    """Return the importances of the alive pieces at every held-out token that is no padding."""
    pieces = [(name, number) for name in decomposition.names for number in alive[name]]
    norms = {name: site.pieces()[1].norm(dim=1) for name, site in decomposition.sites.items()}
    parts: list[tuple[np.ndarray[Any, Any], ...]] = []
    for batch in setting.held_out:
        counted = batch.attention_mask.bool()
        with decomposition.reading() as inputs:
            setting.tuned(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        importances = decomposition.importances(inputs)
        columns = {name: importances[name].lower[counted][:, alive[name]] for name in decomposition.names}
        written = {
            name: (site.activations(inputs[name])[counted] * norms[name])[:, alive[name]]
            for name, site in decomposition.sites.items()
        }
        rows, positions = (axis.cpu().numpy() for axis in counted.nonzero(as_tuple=True))
        values = (torch.cat(list(of.values()), dim=1).float().cpu().numpy() for of in (columns, written))
        parts.append((*values, batch.ids[counted].cpu().numpy(), batch.numbers[rows], positions))
    g, a, *others = (np.concatenate(column) for column in zip(*parts, strict=True))
    signs = np.where((a * g).sum(axis=0) < 0, -1, 1)
    return Reading(pieces, g, a * signs, *others)


def read_pieces(
    setting: Setting, decomposition: Decomposition, measured: Explained, reading: Reading
) -> pandas.DataFrame:
    """Return one row per alive piece, the most written first.

    Columns: site, piece; mean_importance, rate (share of tokens with importance above ON), norm, energy (<u v^T, D> /
    ||D||^2 of its site), written (mean importance times rms of what it writes), main_label and main_label_share (of its
    importance), tokens (those with most of its importance), context (of its largest importance times activation).
    """
    labels = np.array(setting.rows.group_names)[setting.rows.groups[reading.documents]]
    entries: list[dict[str, Any]] = []
    for column, (name, number) in enumerate(reading.pieces):
        g, a = reading.importances[:, column].astype(np.float64), reading.activations[:, column]
        by_label = pandas.Series(g).groupby(labels).sum().sort_values(ascending=False)
        by_token = pandas.Series(g).groupby(reading.ids).sum().sort_values(ascending=False)
        best = int(np.argmax(g * np.abs(a)))
        words = [repr(setting.tokenizer.decode([int(i)])) for i in by_token.index[:TOP_TOKENS]]
        total = max(float(g.sum()), 1e-30)
        entries.append(
            {
                "site": name, "piece": number, "mean_importance": float(measured.mean[name][number]),
                "rate": float((g > ON).mean()), **geometry(decomposition, name, number),
                "written": float(g.mean() * np.sqrt(np.mean(a.astype(np.float64) ** 2))),
                "main_label": str(by_label.index[0]), "main_label_share": float(by_label.iloc[0]) / total,
                "tokens": " ".join(words),
                "context": context_of(setting, int(reading.documents[best]), int(reading.positions[best])),
            }
        )  # fmt: skip
    table = pandas.DataFrame(entries)
    return table.sort_values("written", ascending=False, ignore_index=True) if len(table) else table


@torch.no_grad()
def geometry(decomposition: Decomposition, name: str, number: int) -> dict[str, float]:
    """Return norm and energy of a piece; the energies of all pieces of a site and of its remainder sum to 1."""
    site = decomposition.sites[name]
    v, u, scale = site.V[:, number], site.U[number], site.scale
    energy = float(u @ site.delta @ v) / max(float(site.delta.square().sum()), 1e-30)
    return {"norm": scale * float(u.norm() * v.norm()), "energy": energy}


class Effect(NamedTuple):
    """Say what switching one piece off does to the tuned model."""

    kl_needed: float
    """KL(tuned || without it), nats per predicted token, where the piece's importance is above NEEDED."""
    kl_idle: float
    """Where it is below IDLE."""
    n_needed: int
    raised: list[str]
    """Tokens whose logits the piece raises most, on average where it is needed."""
    lowered: list[str]


@torch.no_grad()
def read_effects(
    setting: Setting, decomposition: Decomposition, pieces: list[tuple[str, int]], batches: list[Batch]
) -> list[Effect]:
    """Return the effect of each of these pieces, over some held-out batches."""
    looked = [looked_at(decomposition, LanguageTask(), batch) for batch in batches]
    effects = []
    for name, number in pieces:
        masks = masks_with(decomposition, {name: [number]}, on=False)
        kls, counts, change = np.zeros(2), np.zeros(2), torch.zeros(looked[0][0].shape[1])
        for batch, (target, importances) in zip(batches, looked, strict=True):
            with decomposition.masked(masks):
                out = logits_at(decomposition.model, batch)
            lost = kl(log_probs(target), log_probs(out))
            g = importances[name].lower[:, :-1][predicted(batch)][:, number]
            for place, of in enumerate((g > NEEDED, g < IDLE)):
                kls[place] += float(lost[of].sum())
                counts[place] += int(of.sum())
            change += (target - out)[g > NEEDED].float().sum(dim=0).cpu()
        needed, idle = (kls / np.maximum(counts, 1)).tolist()
        raised, lowered = (
            [setting.tokenizer.decode([i]) for i in (sign * change).topk(TOP_TOKENS).indices.tolist()]
            if counts[0]
            else []
            for sign in (1, -1)
        )
        effects.append(Effect(needed, idle, int(counts[0]), raised, lowered))
    return effects


def moments(setting: Setting, decomposition: Decomposition) -> dict[str, Tensor]:
    """Return the mean of x x^T at each site over the held-out tokens, in the tuned model."""
    totals: dict[str, Tensor] = {}
    n = 0
    for batch in setting.held_out:
        counted = batch.attention_mask.bool()
        with torch.no_grad(), decomposition.reading() as inputs:
            setting.tuned(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        n += int(counted.sum())
        for name, x in inputs.items():
            rows = x[counted].float()
            totals[name] = totals.get(name, torch.zeros(())) + rows.T @ rows
    return {name: total / n for name, total in totals.items()}
