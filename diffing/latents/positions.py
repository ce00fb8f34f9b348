r"""Where around a response latents fire: shares of activation by place, summed in the pass of Latent Scaling.

    template_-8 ... template_-1    tokens of the chat template, by their distance to the response that follows
    template_other                 other tokens of the template
    response_1 ... response_9      tokens of a response, by their place in it
    response_later, other          later ones; everything else (plain text, user and system messages)

The share of latent j at a place is sum_{n at the place} f_nj / sum_n f_nj, activation mass as in contexts.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from crosscoders.activations.scored import Tokens
from crosscoders.dictionary import selection
from crosscoders.text.tokens import ROLES

BEFORE, AFTER = 8, 9
PLACES = (
    *(f"template_-{distance}" for distance in range(BEFORE, 0, -1)),
    "template_other",
    *(f"response_{place}" for place in range(1, AFTER + 1)),
    "response_later",
    "other",
)
_TEMPLATE, _RESPONSE = ROLES.index("template"), ROLES.index("assistant")


def place_indices(
    roles: UInt8[Tensor, " tokens"], positions: Int[Tensor, " tokens"], documents: Int[Tensor, " tokens"]
) -> Int[Tensor, " tokens"]:
    """Return the index into `PLACES` of every token of whole documents, each of which stands together."""
    n = len(roles)
    is_response = roles == _RESPONSE
    begins = is_response.clone()
    begins[1:] &= ~is_response[:-1] | (documents[1:] != documents[:-1])
    starts = begins.nonzero().squeeze(1)
    indices = torch.full((n,), PLACES.index("other"))
    indices[roles == _TEMPLATE] = PLACES.index("template_other")
    if not len(starts):
        return indices
    order = torch.arange(n)
    following = torch.searchsorted(starts, order).clamp(max=len(starts) - 1)
    distance = positions[starts[following]] - positions
    near = (roles == _TEMPLATE) & (documents == documents[starts[following]]) & (distance >= 1) & (distance <= BEFORE)
    indices[near] = BEFORE - distance[near].long()
    started = starts[(torch.searchsorted(starts, order, right=True) - 1).clamp(min=0)]
    place = (positions - positions[started] + 1).long().clamp(max=AFTER + 1)
    indices[is_response] = PLACES.index("response_1") - 1 + place[is_response]
    return indices


class _Held(NamedTuple):
    """Tokens whose document may go on in the next batch, and the active latents on them."""

    roles: Tensor
    positions: Tensor
    documents: Tensor
    tokens: Tensor
    latents: Tensor
    values: Tensor


class PositionSums:
    """Activation mass of each latent at each place, float64; batches may cut documents anywhere."""

    def __init__(self, dict_size: int) -> None:
        self.mass = torch.zeros(dict_size, len(PLACES), dtype=torch.float64)
        self._held: _Held | None = None

    def add(self, latents: selection.Active, tokens: Tokens) -> None:
        """Add one batch in cache order; its last document waits for the next batch."""
        entries = (latents.tokens.cpu(), latents.latents.cpu(), latents.values.double().cpu())
        now = _Held(tokens.roles, tokens.positions, tokens.document_ids, *entries)
        if self._held is not None:
            now = now._replace(tokens=now.tokens + len(self._held.roles))
            now = _Held(*(torch.cat(pair) for pair in zip(self._held, now, strict=True)))
        n_complete = int((now.documents == now.documents[-1]).nonzero()[0])
        self._count(now, n_complete)
        waiting = now.tokens >= n_complete
        self._held = _Held(
            roles=now.roles[n_complete:],
            positions=now.positions[n_complete:],
            documents=now.documents[n_complete:],
            tokens=now.tokens[waiting] - n_complete,
            latents=now.latents[waiting],
            values=now.values[waiting],
        )

    def _count(self, held: _Held, n: int) -> None:
        if n:
            inside = held.tokens < n
            at = place_indices(held.roles[:n], held.positions[:n], held.documents[:n])[held.tokens[inside]]
            index = held.latents[inside] * len(PLACES) + at
            counted = torch.bincount(index, weights=held.values[inside], minlength=self.mass.numel())
            self.mass += counted.view_as(self.mass)

    def shares(self) -> Float[Tensor, "dict_size places"]:
        """Return the shares over all tokens added; 0 for a latent that never fires. Call it once, at the end."""
        if self._held is not None:
            self._count(self._held, len(self._held.roles))
            self._held = None
        return self.mass / self.mass.sum(dim=1, keepdim=True).clamp_min(1e-300)
