"""Classes of predictions, each with its own cross-entropy and KL: by place, frequency and role of the predicted token.

    position.first_9, position.later     number of the scored prediction in its sequence
    frequency.common, frequency.rare     the most frequent token ids that together make up half of the scored tokens of
                                         the evaluation, or more; all others
    role.<role>                          `crosscoders.text.tokens.ROLES`, where the text has more than one

The classes of a kind cover all predictions and do not overlap.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosscoders.text.padding import Batch
from crosscoders.text.tokens import ROLES, Rows

N_FIRST = 9


@runtime_checkable
class Classes(Protocol):
    """Named classes of predictions; a token may be in several, or in none."""

    @property
    def names(self) -> list[str]: ...

    def of(self, batch: Batch, used: Bool[Tensor, "rows seq"]) -> dict[str, Bool[Tensor, "rows seq"]]: ...


class TokenClasses:
    """Which class each prediction of a batch is in."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        ids, counts = np.unique(rows.ids[rows.scored], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        before = np.cumsum(counts[order]) - counts[order]
        self.common = torch.from_numpy(np.sort(ids[order][before < counts.sum() / 2]))
        present = np.unique(rows.roles[rows.scored])
        self.roles = {int(role): ROLES[role] for role in present} if len(present) > 1 else {}

    @property
    def names(self) -> list[str]:
        first = ["position.first_9", "position.later", "frequency.common", "frequency.rare"]
        return first + [f"role.{name}" for name in self.roles.values()]

    def of(self, batch: Batch, used: Bool[Tensor, "rows seq"]) -> dict[str, Bool[Tensor, "rows seq"]]:
        """Return the predictions of each class among those that are used, marked at the token that is predicted."""
        is_first = used.cumsum(dim=1) <= N_FIRST
        is_common = torch.isin(batch.ids, self.common.to(batch.ids.device))
        masks = [is_first, ~is_first, is_common, ~is_common]
        roles = roles_of(self.rows, batch)
        masks += [roles == role for role in self.roles]
        return {name: used & mask for name, mask in zip(self.names, masks, strict=True)}


def roles_of(rows: Rows, batch: Batch) -> Int[Tensor, "rows seq"]:
    """Return the role of each token of a batch, as an index into `ROLES`; -1 on padding."""
    roles = torch.full(batch.ids.shape, -1)
    for r, number in enumerate(batch.numbers):
        start, stop = rows.offsets[number : number + 2]
        roles[r, : stop - start] = torch.from_numpy(rows.roles[start:stop].astype(np.int64))
    return roles.to(batch.ids.device)
