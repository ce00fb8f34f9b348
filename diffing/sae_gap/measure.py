r"""Gaps of one model around a dictionary, by sequence and by class of the token that is predicted.

Cells: {adapter off, on} x {dictionary off, on}, as in sae_lora.evaluation.cells; per prediction

    ce = -log q(token)           kl = KL(p || q), p the model without both

Classes go by what the predicted token belongs to: the chat template, a response, a prompt (user, system), or raw text.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from crosscoders.models.resume import final_states, head_alone
from crosscoders.text.tokens import ROLES
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.evaluation.cells import of_predictions
from sae_lora.fitting.inputs import Plan
from sae_lora.lora.adapter import lora_off
from sae_lora.splicing import splice

CELLS = ("plain", "spliced", "adapted", "adapted_spliced")
QUANTITIES = ("ce", "kl")
"""Of `sae_lora.evaluation.cells.of_predictions`, the first."""
CLASSES = {
    "all": ROLES,
    "template": ("template",),
    "response": ("assistant",),
    "prompt": ("user", "system", "tool"),
    "text": ("text",),
}


class Gaps(NamedTuple):
    """Sums over the predictions of each sequence."""

    sums: Float[np.ndarray, "classes cells quantities sequences"]
    n_tokens: Int[np.ndarray, "classes sequences"]


def measure(
    adapted: Any, dictionaries: Sequence[FrozenDictionary], plan: Plan, *, batch_rows: int, device: torch.device
) -> Gaps:
    """Every cell of a PEFT model over all sequences of a plan; predictions of BOS and padding are not counted."""
    n_sequences = len(plan.rows.offsets) - 1
    sums = np.zeros((len(CLASSES), len(CELLS), len(QUANTITIES), n_sequences))
    n_tokens = np.zeros((len(CLASSES), n_sequences), dtype=np.int64)
    for batch in plan.batches(batch_rows, device):
        inside = [_classes(plan, int(number)) for number in batch.numbers]
        n_tokens[:, batch.numbers] = np.stack([found.sum(axis=1) for found in inside], axis=1)
        finals = []
        for cell in CELLS:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                if not cell.startswith("adapted"):
                    stack.enter_context(lora_off(adapted))
                if cell.endswith("spliced"):
                    stack.enter_context(splice(adapted, dictionaries, keep_ids=plan.keep_ids))
                finals.append(final_states(adapted, batch))
        with torch.no_grad(), head_alone(adapted) as to_logits:
            for r, number in enumerate(batch.numbers):
                n = inside[r].shape[1]
                each = of_predictions(to_logits, [x[r, :n] for x in finals], batch.ids[r, 1 : n + 1]).cpu().numpy()
                sums[..., number] = np.einsum("kn,cqn->kcq", inside[r], each[:, : len(QUANTITIES)])
    return Gaps(sums, n_tokens)


def _classes(plan: Plan, number: int) -> Bool[np.ndarray, "classes predictions"]:
    """Which predictions of a sequence are of each class."""
    tokens = slice(plan.rows.offsets[number] + 1, plan.rows.offsets[number + 1])  # nothing predicts the first one
    roles, scored = plan.rows.roles[tokens], plan.rows.scored[tokens]
    return np.stack([np.isin(roles, [ROLES.index(role) for role in names]) & scored for names in CLASSES.values()])
