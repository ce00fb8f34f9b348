r"""Which planted feature each latent stands for.

    side_j        tuned if ||d_j^tuned|| >= ||d_j^base||, else base: the model that the latent writes to most
    cosine_ji     cos(d_j^side, v_i^side); 0 where the feature has no vector in that model
    correlation_ji  Pearson correlation of f_j and s_i over all evaluation tokens, zeros included

    held gain_j   <b, t> / <t, t>: t = a v_i^tuned + a' v_p^tuned, the part of d_j^tuned that its feature i and the
                  feature's parent p span (least squares), and b = a v_i^base + a' v_p^base. The gain of what the latent
                  holds: that of its feature where it holds none of the parent

Latent j matches the feature of largest correlation among those with correlation and cosine >= 0.5, and none where there
is no such feature. Several latents may match one feature. A feature that no latent matches counts as missed, and
its best latent is otherwise the one of largest correlation.
"""

from typing import Protocol

import numpy as np
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.planted.generator import Sample
from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.latents.partners import OTHER_SIDE

MIN_CORRELATION = 0.5
MIN_COSINE = 0.5


class Planted(Protocol):
    """What was planted, by `generator` or `unkind`: a row of class, gain and parent per feature, and its vectors."""

    @property
    def table(self) -> pandas.DataFrame: ...
    @property
    def vectors(self) -> Float[Tensor, "features 2 d_model"]: ...


def correlations(a: Float[Tensor, "tokens first"], b: Float[Tensor, "tokens second"]) -> Float[Tensor, "first second"]:
    """Return Pearson correlation of every pair of columns; 0 where a column is constant."""
    return normalize(a - a.mean(dim=0), dim=0).T @ normalize(b - b.mean(dim=0), dim=0)


def match(
    crosscoder: Crosscoder, latents: Float[Tensor, "tokens dict_size"], sample: Sample, truth: Planted
) -> pandas.DataFrame:
    """Return one row per latent: feature (-1: none), correlation with it, its class, gain, and whether it is a child.

    Without a match: class "unmatched", correlation 0, gain NaN, child False.
    """
    side = (crosscoder.relative_decoder_norm >= 0.5).long()
    decoder = crosscoder.decoder()[torch.arange(len(side)), side]
    cosines = torch.einsum("jd,imd->jmi", normalize(decoder, dim=1), normalize(truth.vectors, dim=2))
    cosine = cosines[torch.arange(len(side)), side]
    correlation = correlations(latents, sample.activations)
    allowed = (correlation >= MIN_CORRELATION) & (cosine >= MIN_COSINE)
    best = torch.where(allowed, correlation, 0.0).max(dim=1)
    is_matched = allowed.any(dim=1).numpy()
    features = truth.table.iloc[best.indices.numpy()]
    return pandas.DataFrame(
        {
            "feature": np.where(is_matched, best.indices.numpy(), -1),
            "correlation": best.values.numpy(),
            "class": np.where(is_matched, features["class"], "unmatched"),
            "gain": np.where(is_matched, features["gain"], np.nan),
            "child": is_matched & (features["parent"].to_numpy() >= 0),
        }
    )


def other_side_correlation(
    crosscoder: Crosscoder, latents: Float[Tensor, "tokens dict_size"]
) -> Float[Tensor, " dict_size"]:
    """Return the largest correlation of a latent with another one that writes to the base model almost alone; 0 without
    any."""
    base_side = crosscoder.relative_decoder_norm <= OTHER_SIDE
    if not base_side.any():
        return torch.zeros(len(base_side))
    with_base = correlations(latents, latents[:, base_side])
    with_base[base_side] = with_base[base_side].fill_diagonal_(0.0)
    return with_base.max(dim=1).values.clamp_min(0.0)


def held_gain(
    crosscoder: Crosscoder, feature: Int[np.ndarray, " dict_size"], truth: Planted
) -> Float[np.ndarray, " dict_size"]:
    """Return the held gain of each latent; NaN without a feature, and for one that the tuned model does not have."""
    parent, shares_held = truth.table["parent"].to_numpy(), np.full(len(feature), np.nan)
    for latent, (own, decoder) in enumerate(zip(feature, crosscoder.decoder()[:, 1], strict=True)):
        if own >= 0 and truth.vectors[own, 1].any():
            base, tuned = truth.vectors[[own, *parent[[own]][parent[[own]] >= 0]]].unbind(dim=1)
            shares = torch.linalg.lstsq(tuned.T, decoder[:, None]).solution[:, 0]
            held = shares @ tuned
            shares_held[latent] = float((shares @ base) @ held / (held @ held))
    return shares_held
