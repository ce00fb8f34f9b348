r"""One word per latent, and a rank: by that word, then by how specific to the tuned model the latent looks.

The ratios of Latent Scaling are used only behind the decoder-norm gate: a rotated latent (both norms alive, unrelated
directions) has ratios near 0 as well, without being new. Bounds are the published ones (Minder et al. 2025), but for
one: a rotated latent that leans to a side (relative norm from 0.7 on, or up to 0.3) is judged by its ratios too. A
feature that fires only under another one takes part of it along, keeps a weak base decoder in that direction, and has
relative norms of 0.78 to 0.87; the benchmark with planted features says what this gains (docs/log.md). None of this is
calibrated on a null of your pair: `diffing.null` gives the rate that makes a count a finding.

    dead               active on no token
    undetermined       active on fewer than `min_active` tokens: not alive
    rotated            relative norm between 0.1 and 0.9, decoder cosine < 0.5, not specific as below
    shared             relative norm between 0.1 and 0.9, otherwise
    shrunk             relative norm >= 0.9 or <= 0.1, |nu_error| above 0.2: Complete Shrinkage
    decoupled          the same gate, else |nu_reconstruction| above 0.5: Latent Decoupling (its partner, where one
                       latent is it, is named by diffing.latents.twins); or specific as below, with a latent of the
                       other model that fires together with it (diffing.latents.partners)
    tuned-specific     relative norm >= 0.9, or >= 0.7 with decoder cosine < 0.5; both ratios below their bounds
    base-specific      relative norm <= 0.1, or <= 0.3 with decoder cosine < 0.5; both mirror ratios below their bounds
    undetermined       behind the gate, anything else

Above and below mean by more than two standard errors. Absolute values are compared, as published: a ratio far below 0
comes from a tuned beta near 0 or from the decoder bias in the reconstruction, and is no sign of anything new.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike

VERDICTS = {
    "tuned-specific": (
        "Tuned-only by norm, or leaning to the tuned side (relative norm from {tuned_leaning}) along another direction "
        "(decoder_cosine below {rotated_cosine}); nu_error below {nu_error} and nu_reconstruction below "
        "{nu_reconstruction}: the base model has nothing of it."
    ),
    "base-specific": "The mirror image (relative norm up to {base_leaning}), with the mirror ratios.",
    "rotated": (
        "Neither tuned-only nor base-only by norm, and decoder_cosine below {rotated_cosine}: both decoder norms are "
        "alive, and each model writes the latent in a direction of its own; not specific to a model."
    ),
    "shrunk": (
        "Tuned-only or base-only by norm, yet the other model's error holds it (ratio from {nu_error}): the sparsity "
        "penalty took its decoder towards 0 (Complete Shrinkage)."
    ),
    "decoupled": (
        "Tuned-only or base-only by norm, yet the other model's reconstruction holds it (ratio from "
        "{nu_reconstruction}): other latents carry it there (Latent Decoupling). Or specific by both ratios, yet a "
        "latent of the other model, its partner, fires together with it (correlation from {partner_correlation})."
    ),
    "shared": "Neither tuned-only nor base-only by norm, and not rotated.",
    "undetermined": (
        "Active on fewer than {min_active} tokens, which is not alive; or tuned-only or base-only by norm, and a ratio "
        "lies within two standard errors of its bound. More tokens would decide."
    ),
    "dead": "Active on no token.",
}
"""What each verdict says, in words for readers; the names in braces are fields of `Thresholds`."""

RANKED = ("tuned-specific", "undetermined", "rotated", "decoupled", "shrunk", "shared")
"""Verdicts of latents that lean to the tuned model, from the strongest sign of something new to the weakest."""


class Thresholds(NamedTuple):
    """Bounds of the verdicts."""

    nu_error: float = 0.2
    nu_reconstruction: float = 0.5
    tuned_only: float = 0.9
    base_only: float = 0.1
    rotated_cosine: float = 0.5
    min_active: int = 30
    tuned_leaning: float = 0.7
    base_leaning: float = 0.3
    partner_correlation: float = 0.7


def verdicts(table: pandas.DataFrame, thresholds: Thresholds | None = None) -> list[str]:
    """Return the verdict of each row of a latent table, by norms, cosine, ratios, and the partner where the table has
    one."""
    bounds = thresholds or Thresholds()
    return [_verdict(row, bounds) for row in table.to_dict("records")]


def _verdict(row: dict[Any, Any], bounds: Thresholds) -> str:
    if row["n_active"] < bounds.min_active:
        return "undetermined" if row["n_active"] else "dead"
    norm = row["relative_decoder_norm"]
    tuned_side = norm >= 0.5
    suffix = "" if tuned_side else "_mirror"
    error = _compare(row[f"nu_error{suffix}"], row[f"nu_error{suffix}_stderr"], bounds.nu_error)
    reconstruction = _compare(
        row[f"nu_reconstruction{suffix}"], row[f"nu_reconstruction{suffix}_stderr"], bounds.nu_reconstruction
    )
    if bounds.base_only < norm < bounds.tuned_only:
        if row["decoder_cosine"] >= bounds.rotated_cosine:
            return "shared"
        if bounds.base_leaning < norm < bounds.tuned_leaning or not error == reconstruction == "below":
            return "rotated"
    if error == "above":
        return "shrunk"
    if reconstruction == "above":
        return "decoupled"
    if error == reconstruction == "below":
        if (row.get("partner_correlation") or 0.0) >= bounds.partner_correlation:
            return "decoupled"
        return "tuned-specific" if tuned_side else "base-specific"
    return "undetermined"


def _compare(value: float, stderr: float, bound: float) -> str:
    if abs(abs(value) - bound) <= 2 * stderr:
        return "unclear"
    return "above" if abs(value) > bound else "below"


def specificity(table: pandas.DataFrame) -> np.ndarray:
    r"""Return (1 - min(1, max(|nu_error|, |nu_reconstruction|))) (1 - decoder_cosine) / 2, in [0, 1].

    High where the base model neither reconstructs nor misses the tuned decoder's direction, and encodes the latent
    along another one. On the embedded pair this order puts planted concepts first; relative norm alone is the worst
    one (docs/log.md).
    """
    largest = np.maximum(table["nu_error"].abs(), table["nu_reconstruction"].abs()).clip(0, 1)
    return np.asarray((1 - largest) * (1 - table["decoder_cosine"]) / 2)


def ranks(table: pandas.DataFrame, thresholds: Thresholds | None = None) -> np.ndarray:
    """Return ranks, 1 = most specific to the tuned model: by verdict in the order of `RANKED`, then by `specificity`,
    among latents that are alive and at least as strong in the tuned model as in the base (relative norm >= 0.5); all
    others come after them."""
    places = [RANKED.index(word) if word in RANKED else len(RANKED) for word in verdicts(table, thresholds)]
    order = np.lexsort((-specificity(table), np.array(places), ~eligible(table, thresholds)))
    rank = np.empty(len(table), dtype=np.int64)
    rank[order] = np.arange(1, len(table) + 1)
    return rank


# --------------------------------------------------------------------------------------------------- sets of latents


def is_alive(n_active: ArrayLike, min_active: float = Thresholds().min_active) -> Bool[np.ndarray, " latents"]:
    """Tell which latents are alive: active on at least `min_active` tokens of the table."""
    return np.asarray(n_active) >= min_active


def alive_latents(table: pandas.DataFrame) -> Int[np.ndarray, " alive"]:
    """Return the numbers of the alive latents of a table."""
    return np.flatnonzero(is_alive(table["n_active"]))


def eligible(table: pandas.DataFrame, thresholds: Thresholds | None = None) -> Bool[np.ndarray, " latents"]:
    """Tell which latents may be called specific to the tuned model: alive, and at least as strong there as in the
    base model (relative decoder norm from 0.5)."""
    alive = is_alive(table["n_active"], (thresholds or Thresholds()).min_active)
    return alive & np.asarray(table["relative_decoder_norm"] >= 0.5)
