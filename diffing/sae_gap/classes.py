"""Classes of predictions by what the predicted token belongs to: chat template, response, prompt, or raw text."""

import torch
from jaxtyping import Bool
from torch import Tensor

from crosscoders.text.padding import Batch
from crosscoders.text.tokens import ROLES, Rows
from sae_lora.evaluation.classes import roles_of

CLASSES = {
    "template": ("template",),
    "response": ("assistant",),
    "prompt": ("user", "system", "tool"),
    "text": ("text",),
}
"""Roles of each class; together with all predictions, `all`, they are what the gaps are measured over."""


class RoleClasses:
    """Tells which class each prediction of a batch is in."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.names = list(CLASSES)

    def of(self, batch: Batch, used: Bool[Tensor, "rows seq"]) -> dict[str, Bool[Tensor, "rows seq"]]:
        """Return the predictions of each class among those that are used, marked at the token that is predicted."""
        roles = roles_of(self.rows, batch)
        indices = {name: torch.tensor([ROLES.index(role) for role in names]) for name, names in CLASSES.items()}
        return {name: used & torch.isin(roles, index.to(roles.device)) for name, index in indices.items()}
