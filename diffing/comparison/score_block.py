r"""Scores per token: does a method's score stand out on the tokens that were planted?

auroc           P(score of a planted token > score of another one) + P(equal) / 2
auroc by chance the same with scores at permuted tokens, the mean over draws
above           share of planted tokens, and of others, above the null's 99.9% quantile of the score
labels          share of the variance of document means that the groups of the data explain (eta squared)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from crosscoders.common.results import row
from crosscoders.common.statistics import bootstrap_interval, resample
from diffing.baselines.diff_mining import token_frequencies
from diffing.baselines.observation import Observed

QUANTILE = 0.999
_DRAWS = 20
_RESAMPLED = 200
"""Resamples of documents for the interval of an AUROC."""

Scores = Float[np.ndarray, " tokens"]


def token_scores(observed: Observed, methods: list[str], n_ids: int) -> dict[str, Scores]:
    """Return the score of every observed token by each method that gives scores.

    diff-mining: the frequency of the token among those that gained most, anywhere.
    """
    scores: dict[str, Scores] = {}
    if "kl-map" in methods:
        scores["kl-map"] = observed.kl.double().numpy()
    if "norm-difference" in methods:
        scores["norm-difference"] = observed.norm_difference.double().numpy()
    if "diff-mining" in methods:
        scores["diff-mining"] = token_frequencies(observed, n_ids)[observed.token_ids.numpy()]
    return scores


def auroc(scores: Scores, planted: Bool[np.ndarray, " tokens"]) -> float:
    """Return the chance that a planted token scores higher than another one; ties count half."""
    from scipy.stats import rankdata

    n_planted = int(planted.sum())
    ranks = rankdata(scores)[planted].sum() - n_planted * (n_planted + 1) / 2
    return float(ranks / (n_planted * (len(scores) - n_planted)))


def score_rows(
    scores: Mapping[str, Scores],
    observed: Observed,
    planted: Bool[np.ndarray, " tokens"] | None,
    thresholds: Mapping[str, float],
    seed: int,
) -> list[dict[str, Any]]:
    """Return rows scores.<method>.*; AUROC where tokens are planted and others are not.

    thresholds: by method, the null's quantile; a method without one has no rows `above`.
    """
    rows, documents, groups = [], observed.documents.numpy(), observed.groups.numpy()
    generator = np.random.default_rng(seed)
    is_told = planted is not None and 0 < int(planted.sum()) < len(planted)
    for method, values in scores.items():
        name, n = f"scores.{method}", len(values)
        rows.append(row(f"{name}.threshold", float(np.quantile(values, QUANTILE)), "score", n))
        if is_told and planted is not None:
            interval = _auroc_interval(values, planted, documents, generator)
            rows.append(row(f"{name}.auroc", auroc(values, planted), "AUROC", n, *interval))
            drawn = [auroc(generator.permutation(values), planted) for _ in range(_DRAWS)]
            rows.append(row(f"{name}.random.auroc", float(np.mean(drawn)), "AUROC", n, min(drawn), max(drawn)))
        if method in thresholds:
            above = values > thresholds[method]
            rows.append(row(f"{name}.above", float(above.mean()), "share", n))
            if is_told and planted is not None:
                rows.append(row(f"{name}.planted_above", float(above[planted].mean()), "share", int(planted.sum())))
        if len(np.unique(groups)) > 1:
            rows.append(
                row(f"{name}.labels", explained(values, documents, groups), "fraction", len(np.unique(documents)))
            )
            drawn = [explained(values, documents, _permuted(documents, groups, generator)) for _ in range(_DRAWS)]
            rows.append(row(f"{name}.random.labels", float(np.mean(drawn)), "fraction", len(np.unique(documents))))
    return rows


def explained(scores: Scores, documents: Int[np.ndarray, " tokens"], groups: Int[np.ndarray, " tokens"]) -> float:
    """Return the share of the variance of documents' mean scores that their groups explain."""
    _, first, number = np.unique(documents, return_index=True, return_inverse=True)
    means = np.bincount(number, scores) / np.bincount(number)
    _, label = np.unique(groups[first], return_inverse=True)
    of_group = (np.bincount(label, means) / np.bincount(label))[label]
    total = ((means - means.mean()) ** 2).sum()
    return float(((of_group - means.mean()) ** 2).sum() / total) if total > 0 else 0.0


def _permuted(
    documents: Int[np.ndarray, " tokens"], groups: Int[np.ndarray, " tokens"], generator: np.random.Generator
) -> Int[np.ndarray, " tokens"]:
    """Return groups that changed documents."""
    _, first, number = np.unique(documents, return_index=True, return_inverse=True)
    return generator.permutation(groups[first])[number]


def _auroc_interval(
    scores: Scores, planted: Bool[np.ndarray, " tokens"], documents: Int[np.ndarray, " tokens"],
    generator: np.random.Generator,
) -> tuple[float, float]:  # fmt: skip
    """Return the 95% interval over documents, as in the weighted AUROC of each resample."""
    _, number = np.unique(documents, return_inverse=True)
    weights = resample(int(number.max()) + 1, generator)[: _RESAMPLED + 1]
    order = np.argsort(scores, kind="stable")
    _, tie = np.unique(scores[order], return_inverse=True)
    is_planted, number = planted[order], number[order]
    values = []
    for counts in weights[:, number]:
        hit, other = np.bincount(tie, counts * is_planted), np.bincount(tie, counts * ~is_planted)
        below = np.cumsum(other) - other / 2
        total = hit.sum() * other.sum()
        values.append(float((hit * below).sum() / total) if total else np.nan)
    kept = np.array(values)
    return bootstrap_interval(np.concatenate([kept[:1], kept[1:][~np.isnan(kept[1:])]]))
