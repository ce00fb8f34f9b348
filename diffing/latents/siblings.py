r"""Siblings: another latent that writes the same direction in one of the models.

    sibling of i by model o   among the other alive latents that do not lean to the model other than o, the j of largest
                              cos(d_i^o, d_j^o)

o is the base for latents with r_i > 0.3 and the tuned model for those with r_i < 0.7; of two, a part is taken, else the
one by the base. Latents that are shared have none. A latent that leans to the tuned model keeps a weak decoder in the
base model, and what it says there is read off the sibling: from a cosine of `Thresholds.same_direction` on it is

    parent   of one direction in both models itself (the same bound): i fires under a concept that both models have, and
             took part of it along
    copy     in the other model of i's direction too (the same bound): one rotated latent in two
    part     otherwise: model o has one direction for what has several in the other one, so a concept split

Decoders alone are read, no data. Source: ours; docs/log.md has what it gains on planted features.
"""

from typing import NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.latents.verdict import Thresholds, in_common_units, is_alive

CHUNK = 1024
"""Latents whose cosines with all others are held at once."""


class _Siblings(NamedTuple):
    """One value per latent: number (-1: none), cosine, and role below a cosine of `same_direction` too."""

    sibling: np.ndarray
    cosine: np.ndarray
    role: np.ndarray


@torch.no_grad()
def with_siblings(
    crosscoder: Crosscoder, table: pandas.DataFrame, thresholds: Thresholds | None = None
) -> pandas.DataFrame:
    """Return the table with columns sibling, sibling_cosine and sibling_role, null for latents that are not alive or
    are shared, and where there is none to choose from."""
    bounds = thresholds or Thresholds()
    described = in_common_units(table)
    norm, cosine = (described[name].to_numpy() for name in ("relative_decoder_norm", "decoder_cosine"))
    alive = is_alive(table["n_active"], bounds.min_active)
    one_sided = (norm <= bounds.base_only) | (norm >= bounds.tuned_only)
    looked_at = alive & (one_sided | (cosine < bounds.rotated_cosine))
    to_tuned, to_base = norm >= bounds.tuned_leaning, norm <= bounds.base_leaning
    directions = normalize(crosscoder.decoder().detach(), dim=2)
    by_base = _by_model(directions, 0, looked_at & ~to_base, alive & ~to_tuned, described, bounds)
    by_tuned = _by_model(directions, 1, looked_at & ~to_tuned, alive & ~to_base, described, bounds)
    taken = (by_base.sibling >= 0) & (_is_part(by_base, bounds) | ~_is_part(by_tuned, bounds))
    sibling, closest, role = (np.where(taken, a, b) for a, b in zip(by_base, by_tuned, strict=True))
    numbers = pandas.array([int(j) if j >= 0 else None for j in sibling], dtype="Int64")
    return table.assign(sibling=numbers, sibling_cosine=closest, sibling_role=role)


def _by_model(
    directions: Float[Tensor, "dict_size 2 d_model"],
    model: int,
    looked_at: Bool[np.ndarray, " dict_size"],
    others: Bool[np.ndarray, " dict_size"],
    table: pandas.DataFrame,
    bounds: Thresholds,
) -> _Siblings:
    n, choice = len(table), np.flatnonzero(others)
    found, closest, role = np.full(n, -1), np.full(n, np.nan), np.full(n, None, dtype=object)
    if not len(choice):
        return _Siblings(found, closest, role)
    own_place = np.full(n, -1)
    own_place[choice] = np.arange(len(choice))
    norm, cosine = (table[name].to_numpy() for name in ("relative_decoder_norm", "decoder_cosine"))
    having = np.flatnonzero(looked_at & ~(others & (len(choice) == 1)))  # a latent is no sibling of its own
    for rows in np.split(having, range(CHUNK, len(having), CHUNK)):
        cosines = directions[rows, model] @ directions[choice, model].T
        itself = own_place[rows]
        cosines[np.flatnonzero(itself >= 0), itself[itself >= 0]] = -torch.inf
        largest = cosines.max(dim=1)
        j = choice[largest.indices.cpu().numpy()]
        found[rows], closest[rows] = j, largest.values.cpu().numpy()
        elsewhere = (directions[rows, 1 - model] * directions[j, 1 - model]).sum(dim=1).cpu().numpy()
        in_both = (norm[j] > bounds.base_only) & (norm[j] < bounds.tuned_only)
        is_parent = in_both & (cosine[j] >= bounds.same_direction)
        is_copy = in_both & (elsewhere >= bounds.same_direction)
        role[rows] = np.where(is_parent, "parent", np.where(is_copy, "copy", "part"))
    return _Siblings(found, closest, role)


def _is_part(siblings: _Siblings, bounds: Thresholds) -> Bool[np.ndarray, " dict_size"]:
    return np.asarray((siblings.role == "part") & (siblings.cosine >= bounds.same_direction))
