"""What the card of a latent shows beside its examples: how its activations are spread, and which decoders lie nearest.

histogram    tokens on which the latent is active, in N_BINS equal bins from 0 to its largest activation
neighbours   the alive latents of largest cosine of [d_base; d_tuned], each latent's two decoders end to end in
             training space, as `stability` matches runs; without itself
"""

from collections.abc import Sequence

import numpy as np
import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.records import Record
from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.latents.decoder_norms import joint_directions
from diffing.latents.verdict import alive_latents

N_BINS, N_NEIGHBOURS = 20, 4


class CardRecord(Record):
    """cards.json"""

    version = 1
    again = "run diffing scale again"
    format_version: int
    histograms: dict[str, list[int]]
    neighbours: dict[str, list[tuple[int, float]]]


class Histograms:
    """Counts of activations of chosen latents, while batches go by."""

    def __init__(self, largest: Sequence[float]) -> None:
        self.largest = torch.tensor([value or 1.0 for value in largest], dtype=torch.float64)
        self.counts = torch.zeros(len(largest), N_BINS, dtype=torch.int64)

    def add(self, latents: Float[Tensor, "batch chosen"]) -> None:
        """Count one batch."""
        tokens, chosen = latents.nonzero(as_tuple=True)
        share = latents[tokens, chosen].double() / self.largest[chosen]
        bins = (share * N_BINS).long().clamp(0, N_BINS - 1)
        flat = torch.bincount(chosen * N_BINS + bins, minlength=self.counts.numel())
        self.counts += flat.view_as(self.counts)


@torch.no_grad()
def neighbours(crosscoder: Crosscoder, table: pandas.DataFrame, latents: list[int]) -> dict[str, list[list[float]]]:
    """Return for each latent its nearest alive ones with their cosine, nearest first."""
    candidates = alive_latents(table)
    theirs = joint_directions(crosscoder, candidates)
    nearest: dict[str, list[list[float]]] = {}
    for part in np.array_split(np.array(latents, dtype=np.int64), max(1, len(latents) // 1024)):
        cosines = joint_directions(crosscoder, part) @ theirs.T
        cosines[torch.from_numpy(part[:, None] == candidates).to(cosines.device)] = -2.0
        best = cosines.topk(min(N_NEIGHBOURS, max(0, len(candidates) - 1)), dim=1)
        for latent, places, values in zip(part.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
            nearest[str(latent)] = [
                [int(candidates[place]), round(value, 3)]
                for place, value in zip(places, values, strict=True)
                if value > -2
            ]
    return nearest
