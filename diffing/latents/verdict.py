r"""One word per latent, and a rank: by that word, then by how specific to the tuned model the latent looks.

The ratios of Latent Scaling are used only behind the decoder-norm gate: a rotated latent (both norms alive, unrelated
directions) has ratios near 0 as well, without being new. Bounds are the published ones (Minder et al. 2025), but for
one: a rotated latent that leans to a side (relative norm from 0.7 on, or up to 0.3) is judged by its ratios too. A
feature that fires only under another one takes part of it along, keeps a weak base decoder in that direction, and has
relative norms of 0.78 to 0.91: where that direction is another latent's of both models (its parent), the verdict is
the strong one, and otherwise `leaning`, a weak one. Concepts of the base model that split in the tuned one lean too,
and are told by the other latent that writes their base direction (diffing.latents.siblings). The benchmark with
planted features says what this gains (docs/log.md). None of this is calibrated on a null of your pair: `diffing.null`
gives the rate that makes a count a finding.

    dead               active on no token
    undetermined       active on fewer than `min_active` tokens: not alive
    rotated            relative norm between 0.1 and 0.9, decoder cosine < 0.5, nothing below; or specific as below, and
                       a copy of a rotated latent
    shared             relative norm between 0.1 and 0.9, otherwise
    shrunk             relative norm >= 0.9 or <= 0.1, |nu_error| above 0.2: Complete Shrinkage
    decoupled          the same gate, else |nu_reconstruction| above 0.5: Latent Decoupling (its partner, where one
                       latent is it, is named by diffing.latents.twins); or specific as below, with a latent of the
                       other model that fires together with it (diffing.latents.partners)
    split              rotated, or specific as below, and part of a concept that has one direction in the other model
    tuned-specific     relative norm >= 0.9, or >= 0.7 with decoder cosine < 0.5 and a parent; both ratios below their
                       bounds
    tuned-leaning      relative norm >= 0.7, decoder cosine < 0.5, both ratios below their bounds
    base-specific      relative norm <= 0.1, or <= 0.3 with decoder cosine < 0.5 and a parent; both mirror ratios below
    base-leaning       relative norm <= 0.3, decoder cosine < 0.5, both mirror ratios below their bounds
    undetermined       behind the gate, anything else

Norms and ratios are compared with the bounds in common units (`in_common_units`). Above and below mean by more than two
standard errors. Absolute values are compared, as published: a ratio far below 0 comes from a tuned beta near 0, and is
no sign of anything new.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike

VERDICTS = {
    "tuned-specific": (
        "Tuned-only by norm, or leaning to the tuned side (relative norm from {tuned_leaning}) along another direction "
        "(decoder_cosine below {rotated_cosine}) with what is left in the base model along its parent, which both "
        "models have; nu_error below {nu_error} and nu_reconstruction below {nu_reconstruction}: the base model has "
        "nothing of it. A strong verdict."
    ),
    "base-specific": "The mirror image (relative norm up to {base_leaning}), with the mirror ratios. A strong verdict.",
    "tuned-leaning": (
        "The same ratios and a relative norm from {tuned_leaning} along another direction, but no parent: a weak "
        "verdict, since rotated latents and parts of split concepts can look like this. Its count on a null of the "
        "pair (diffing null) says what it is worth there."
    ),
    "base-leaning": "The mirror image (relative norm up to {base_leaning}), with the mirror ratios. A weak verdict.",
    "split": (
        "Rotated, or specific by its ratios, yet its direction in one model (cosine from {same_direction}) is that of "
        "another latent, its sibling, which writes along another one in the other model: one concept of the one model "
        "is several in the other; not new."
    ),
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

STRONG, WEAK = ("tuned-specific", "base-specific"), ("tuned-leaning", "base-leaning")
"""Verdicts that call a latent specific to a model: on planted features nearly always right, and often wrong."""

RANKED = ("tuned-specific", "tuned-leaning", "undetermined", "split", "rotated", "decoupled", "shrunk", "shared")
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
    same_direction: float = 0.9


def verdicts(table: pandas.DataFrame, thresholds: Thresholds | None = None) -> list[str]:
    """Return the verdict of each row of a latent table, by norms, cosine, ratios, and the sibling and partner where the
    table has them."""
    bounds = thresholds or Thresholds()
    return [_verdict(row, bounds) for row in in_common_units(table).to_dict("records")]


def in_common_units(table: pandas.DataFrame) -> pandas.DataFrame:
    r"""Return the table with relative decoder norms and ratios in units that neither a constant added to one model nor
    a scale of it changes: per model in the root mean square of ||x - mean x||, and nu_reconstruction without the
    decoder bias. A table that has no columns for it is returned as it is."""
    changed: dict[str, Any] = {}
    for suffix in ("", "_stderr", "_mirror", "_mirror_stderr"):
        if f"nu_reconstruction_no_bias{suffix}" in table:
            changed[f"nu_reconstruction{suffix}"] = table[f"nu_reconstruction_no_bias{suffix}"]
    if "norm_ratio" not in table:
        return table.assign(**changed)
    base, tuned = table["decoder_norm_base"] / table["norm_ratio"], table["decoder_norm_tuned"]
    changed["relative_decoder_norm"] = 0.5 * (1 + (tuned - base) / np.maximum(base, tuned).clip(1e-30))
    for target in ("nu_error", "nu_reconstruction"):
        for suffix, factor in (("", 1 / table["norm_ratio"]), ("_mirror", table["norm_ratio"])):
            for name in (f"{target}{suffix}", f"{target}{suffix}_stderr"):
                changed[name] = changed.get(name, table[name]) * factor
    left = [name for name in table if str(name).startswith(("norm_ratio", "nu_reconstruction_no_bias"))]
    return table.assign(**changed).drop(columns=left)


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
            return "split" if _role(row, bounds) == "part" else "rotated"
    if error == "above":
        return "shrunk"
    if reconstruction == "above":
        return "decoupled"
    if error == reconstruction == "below":
        if (row.get("partner_correlation") or 0.0) >= bounds.partner_correlation:
            return "decoupled"
        return _specific(row, bounds)
    return "undetermined"


def _specific(row: dict[Any, Any], bounds: Thresholds) -> str:
    """Return the verdict of a latent whose ratios are both below their bounds."""
    role, norm = _role(row, bounds), row["relative_decoder_norm"]
    if role in ("part", "copy"):
        return "split" if role == "part" else "rotated"
    side = "tuned" if norm >= 0.5 else "base"
    leans = bounds.base_only < norm < bounds.tuned_only
    return f"{side}-leaning" if leans and role != "parent" else f"{side}-specific"


def _role(row: dict[Any, Any], bounds: Thresholds) -> str | None:
    return row.get("sibling_role") if (row.get("sibling_cosine") or 0.0) >= bounds.same_direction else None


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
    table = in_common_units(table)
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
    return alive & np.asarray(in_common_units(table)["relative_decoder_norm"] >= 0.5)
