"""One pass of both whole models over rows of tokens: activations, KL of each prediction, and the tokens that gained.

What the cheap methods share, so that no method pays for the models again. A token's KL and gains are those of the
prediction that was made for it, one position before; its activation is its own.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.common.progress import Progress
from crosscoders.models import predictions
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import ResumableModel
from crosscoders.text.padding import padding_id
from crosscoders.text.tokens import Rows, pad_rows

_LOGITS = 1 << 24
"""Entries of one tensor of logits: 64 MiB in float32."""


class Observed(NamedTuple):
    """Scored tokens after the first position of their row, in the order of the pass."""

    x: Float[Tensor, "tokens 2 d_model"]
    """Activations of base and tuned, float32."""
    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    documents: Int[Tensor, " tokens"]
    groups: Int[Tensor, " tokens"]
    kl: Float[Tensor, " tokens"]
    """KL(tuned || base), nats."""
    gained_ids: Int[Tensor, "tokens top"]
    """Tokens whose log-probability grew most from base to tuned, the largest gain first."""
    gains: Float[Tensor, "tokens top"]
    """These gains, nats; in the order of the logits' differences, since the two differ by a constant a position."""

    @property
    def delta(self) -> Float[Tensor, "tokens d_model"]:
        """Tuned minus base."""
        return self.x[:, 1] - self.x[:, 0]

    @property
    def norm_difference(self) -> Float[Tensor, " tokens"]:
        """Length of the difference of the activations."""
        return self.delta.norm(dim=1)


def observe(pair: ModelPair, rows: Rows, *, batch_rows: int = 16, top: int = 100) -> Observed:
    """Run both models over all rows; `pair` holds whole models.

    Raises:
        InputError: both models give the same activations and predictions.
    """
    models = [ResumableModel(model, pair.hook_points[0]) for model in pair.models]
    n_ids = pair.info.n_ids
    parts: list[list[Tensor]] = []
    progress = Progress("read", total=rows.n_scored, unit="tok")
    for numbers in rows.batches(batch_rows):
        batch = pad_rows(rows, numbers, padding_id(pair.info.tokenizer, n_ids))
        scored = batch.scored.clone()
        scored[:, 0] = False  # nothing predicts it
        states = [model.run(batch.to(pair.device)) for model in models]
        at, before = scored.to(pair.device), scored[:, 1:].to(pair.device)
        x = torch.stack([state.activation[at].float().cpu() for state in states], dim=1)
        finals = [state.final[:, :-1][before] for state in states]
        documents = torch.from_numpy(batch.numbers)[:, None].expand(scored.shape)[scored]
        parts.append(
            [
                x,
                batch.ids[scored],
                torch.arange(scored.shape[1]).expand(scored.shape)[scored],
                documents,
                torch.from_numpy(rows.groups)[documents],
                *_compared(models, finals, n_ids, min(top, n_ids)),
            ]
        )
        progress.update(int(batch.scored.sum()))
    progress.close()
    observed = Observed(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    if not observed.kl.any() and not observed.delta.any():
        raise InputError(
            f"base {pair.info.base!r} and tuned {pair.info.tuned!r} give the same activations and predictions on "
            "these tokens, so there is no difference to describe. Check the paths."
        )
    return observed


@torch.inference_mode()
def _compared(
    models: list[ResumableModel], finals: list[Float[Tensor, "tokens d_model"]], n_ids: int, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(tuned || base), the tokens that gained most, and their gains; logits in chunks."""
    kls, ids, gains = [], [], []
    for span in torch.arange(len(finals[0])).split(max(1, _LOGITS // n_ids)):
        base, tuned = (
            predictions.log_probs(model.logits(final[span])[:, :n_ids])
            for model, final in zip(models, finals, strict=True)
        )
        kls.append(predictions.kl(tuned, base).cpu())
        best = (tuned - base).topk(top, dim=1)
        ids.append(best.indices.int().cpu())
        gains.append(best.values.float().cpu())
    return torch.cat(kls), torch.cat(ids), torch.cat(gains)


def first_positions(observed: Observed, n: int) -> list[Int[np.ndarray, " tokens"]]:
    """Return the numbers of the tokens at each of the first `n` positions after the first of their rows."""
    positions = observed.positions.numpy()
    return [np.flatnonzero(positions == place) for place in range(1, n + 1)]
