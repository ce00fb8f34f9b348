"""Rows of different length side by side: `pad` for one array of each row, `make_batch` for what a model reads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


class Batch(NamedTuple):
    """Sequences, padded on the right; padding is neither attended to nor scored."""

    ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    scored: Bool[Tensor, "rows seq"]
    """Tokens whose activation or prediction counts: no padding, no BOS."""
    numbers: Int[np.ndarray, " rows"]
    """Number of each sequence, which is also the document's."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on the device of a model."""
        ids, mask, scored = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return Batch(ids, mask, scored, self.numbers)

    def take(self, rows: Int[Tensor, " chosen"]) -> "Batch":
        """Return these rows, in this order, at the same width."""
        ids, mask, scored = (tensor[rows] for tensor in self[:3])
        return Batch(ids, mask, scored, self.numbers[rows.cpu().numpy()])


def pad(rows: Sequence[Shaped[np.ndarray, " _"]], fill: int, dtype: torch.dtype) -> Shaped[Tensor, "rows seq"]:
    """Return the rows as one tensor, as wide as the longest of them, with `fill` to the right of the others."""
    padded = torch.full((len(rows), max(len(row) for row in rows)), fill, dtype=dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row)
    return padded


def make_batch(
    ids: Sequence[Int[np.ndarray, " _"]],
    scored: Sequence[Bool[np.ndarray, " _"]],
    numbers: Int[np.ndarray, " rows"],
    pad_id: int,
) -> Batch:
    """Return the rows as what a model reads, on the CPU."""
    mask = pad([np.ones(len(row), dtype=np.int64) for row in ids], 0, torch.int64)
    return Batch(pad(ids, pad_id, torch.int64), mask, pad(scored, 0, torch.bool), numbers)


def padding_id(tokenizer: Any, n_ids: int | None = None) -> int:
    """Return the id that padding has: the tokenizer's, or 0 where it has none among the model's n_ids."""
    pad = tokenizer.pad_token_id
    return 0 if pad is None or (n_ids is not None and int(pad) >= n_ids) else int(pad)
