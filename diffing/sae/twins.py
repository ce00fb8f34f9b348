r"""Two dictionaries with the same latent numbers, one of each model: are they twins, and what does each explain?

    cosine_j   = <d_j, d'_j> / (||d_j|| ||d'_j||)     of what latent j writes in either dictionary
    chance     = 99.9% quantile of the cosines <d_j, d'_sigma(j)>, sigma random permutations without fixed points
    aligned    = share of latents with cosine_j > chance; .001 for dictionaries that have nothing to do with each other

Twins have `aligned` of at least 0.5; others are refused, since a table by number would compare strangers. The 2 x 2
table is models by dictionaries: FVE, L0, and the cross-entropy that the splice of the reconstruction adds on responses.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.common.progress import about
from crosscoders.common.results import row
from crosscoders.common.statistics import bootstrap_interval, resample
from crosscoders.models.pair import ModelPair
from crosscoders.text.chats import Chat
from diffing.causal.patching import DIRECTIONS, measure
from diffing.causal.sets import PatchSet
from diffing.sae.patching import SharedExchange
from diffing.sae.rates import MODELS, Rates
from sae_lora.dictionaries.frozen import FrozenDictionary

MIN_ALIGNED = 0.5
_SHIFTS = 8


class Alignment(NamedTuple):
    """How two decoders match number by number."""

    cosine: Float[Tensor, " dict_size"]
    chance: float
    """Cosine that one in a thousand pairs of other numbers exceeds."""
    aligned: float
    """Share of latents above it."""
    permuted: float
    """The same share under a permutation that took no part in `chance`."""


def alignment(
    one: Float[Tensor, "dict_size d_model"], other: Float[Tensor, "dict_size d_model"], seed: int
) -> Alignment:
    """Compare decoders at the same numbers, and at permuted ones."""
    one, other = (torch.nn.functional.normalize(rows.cpu().double(), dim=1) for rows in (one, other))
    cosine = (one * other).sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    drawn = [_permuted_cosine(one, other, generator) for _ in range(_SHIFTS + 1)]
    chance = float(np.quantile(torch.cat(drawn[1:]).numpy(), 0.999))
    return Alignment(
        cosine, chance, float((cosine > chance).double().mean()), float((drawn[0] > chance).double().mean())
    )


def _permuted_cosine(one: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Return cosines at other numbers: a random cycle through all latents, which leaves none in its place."""
    order = torch.randperm(len(one), generator=generator)
    return (one[order] * other[order.roll(1)]).sum(dim=1)


def require_aligned(aligned: Alignment, sae: str, tuned_sae: str) -> None:
    """Raise InputError unless two dictionaries are twins."""
    if aligned.aligned < MIN_ALIGNED:
        raise InputError(
            f"latents of {tuned_sae!r} and {sae!r} do not match by number: {aligned.aligned:.1%} have decoders more "
            f"alike than chance (cosine {aligned.chance:.2f}); twins have {MIN_ALIGNED:.0%} or more. Give an SAE that "
            "was fine-tuned from the other, or leave --tuned-sae out."
        )


def quality_rows(rates: dict[str, Rates]) -> list[dict[str, Any]]:
    """Return rows sae.<dictionary>.<model>.{fve,l0}."""
    entries = []
    for name, of_dictionary in rates.items():
        for m, model in enumerate(MODELS):
            n = of_dictionary.n_tokens
            if (fve := of_dictionary.fve[m]) is not None:
                entries.append(row(f"sae.{name}.{model}.fve", fve, "fraction", n))
            entries.append(row(f"sae.{name}.{model}.l0", of_dictionary.l0[m], "latents/token", n))
    return entries


def splice_rows(
    dictionaries: dict[str, FrozenDictionary], pair: ModelPair, chats: list[Chat], *, batch_rows: int, seed: int
) -> list[dict[str, Any]]:
    """Return rows sae.<dictionary>.<model>.splice_ce: what the splice of the reconstruction adds to the cross-entropy
    of response tokens, with 95% bootstrap intervals over documents."""
    sets = {direction: [PatchSet("reconstruction", "reconstruction")] for direction in DIRECTIONS}
    weights, entries = resample(len(chats), seed), []
    for name, dictionary in dictionaries.items():
        with about(f"splice of {name}"):
            measured = measure(SharedExchange(dictionary, []), pair, chats, sets, batch_rows=batch_rows)
        for direction, model in sorted(DIRECTIONS.items(), key=lambda entry: entry[1]):
            sums = measured[direction]
            added = weights @ (sums.ce[0, 0] - sums.own_ce[0]) / (weights @ sums.n_tokens[0])
            low, high = bootstrap_interval(added) if len(chats) > 1 else (None, None)
            n = int(sums.n_tokens[0].sum())
            entries.append(row(f"sae.{name}.{MODELS[model]}.splice_ce", float(added[0]), "nats/token", n, low, high))
    return entries
