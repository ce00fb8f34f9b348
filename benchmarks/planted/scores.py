r"""Scores for "this latent belongs to the tuned model alone", and how good each one is.

A score is high where it says tuned-only, and flags a latent from its bound on. Latents that fire on fewer than 30
evaluation tokens are left out, and so are those that match a rescaled feature of gain below 0.2, which is neither
clearly tuned-only nor clearly not. All others count, unmatched ones as wrong.

    precision   flagged latents that match a tuned-only feature / flagged latents
    recall      tuned-only features that a flagged latent matches / all planted tuned-only features
    f1          2 precision recall / (precision + recall)
    auroc, ap   over latents, positive where they match a tuned-only feature, whatever the bound
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas

from diffing.latents.verdict import Thresholds, is_alive, verdicts

WEAK_GAIN = 0.2
"""Rescaled features below this gain are left out of precision and recall."""


class Score(NamedTuple):
    value: Callable[[pandas.DataFrame], np.ndarray]
    bound: float
    """Flagged from here on."""


PUBLISHED = Thresholds()._replace(tuned_leaning=Thresholds().tuned_only, base_leaning=Thresholds().base_only)
"""Verdicts without the rule for rotated latents that lean to a side."""


def specific(table: pandas.DataFrame, thresholds: Thresholds | None = None) -> np.ndarray:
    """Return whether norms, cosine and ratios alone say tuned-specific or tuned-leaning."""
    return _is_specific(table.drop(columns=["partner_correlation", "sibling_cosine"]), thresholds)


def _is_specific(table: pandas.DataFrame, thresholds: Thresholds | None = None) -> np.ndarray:
    return np.isin(verdicts(table, thresholds), ("tuned-specific", "tuned-leaning"))


SCORES = {
    # Bounds of Minder et al. 2025.
    "norm": Score(lambda t: t["relative_decoder_norm"].to_numpy(), 0.9),
    "nu_error": Score(lambda t: -t["nu_error"].abs().to_numpy(), -0.2),
    "nu_reconstruction": Score(lambda t: -t["nu_reconstruction"].abs().to_numpy(), -0.5),
    # Bounds from `calibration`.
    "norm_difference": Score(lambda t: (t["decoder_norm_tuned"] - t["decoder_norm_base"]).to_numpy(), 0.61),
    "nu_max": Score(lambda t: -t[["nu_error", "nu_reconstruction"]].abs().max(axis=1).to_numpy(), -0.23),
    "specificity": Score(lambda t: (t["specificity"] * (t["relative_decoder_norm"] >= 0.5)).to_numpy(), 0.12),
    # Words: 1 where the verdict is tuned-specific, or leans where the name says so or nothing tells the two apart.
    "published_verdict": Score(lambda t: specific(t, PUBLISHED).astype(float), 1.0),
    "verdict_by_ratios": Score(lambda t: specific(t).astype(float), 1.0),
    "without_siblings": Score(lambda t: _is_specific(t.drop(columns="sibling_cosine")).astype(float), 1.0),
    "verdict_or_leaning": Score(lambda t: _is_specific(t).astype(float), 1.0),
    "verdict": Score(lambda t: (t["verdict"] == "tuned-specific").to_numpy().astype(float), 1.0),
}


def alive_rows(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the rows of the alive latents."""
    return table[is_alive(table["n_active"])]


def weak(table: pandas.DataFrame) -> pandas.Series:
    """Return which rows, latents or features, are of a rescaled feature of gain below 0.2."""
    return (table["class"] == "rescaled") & (table["gain"] < WEAK_GAIN)


def counted(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the latents that count in precision, recall, AUROC and AP."""
    return alive_rows(table[~weak(table)])


def judge(table: pandas.DataFrame, score: Score, n_features: int) -> dict[str, float]:
    """Return the five measures for one crosscoder; NaN where a measure is undefined (nothing flagged).

    n_features: planted tuned-only features.
    """
    table = counted(table)
    value, positive = score.value(table), (table["class"] == "tuned-only").to_numpy()
    flagged = value >= score.bound
    hits = int((flagged & positive).sum())
    precision = hits / flagged.sum() if flagged.any() else float("nan")
    recall = table["feature"][flagged & positive].nunique() / n_features
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "auroc": auroc(value, positive),
        "ap": average_precision(value, positive),
    }


def auroc(value: np.ndarray, positive: np.ndarray) -> float:
    """Return the chance that a positive has a larger value than a negative, ties counting half; NaN without either."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    rank = pandas.Series(value).rank().to_numpy()  # ties share their mean rank
    return float((rank[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def average_precision(value: np.ndarray, positive: np.ndarray) -> float:
    r"""Return the sum over distinct values, from large to small, of (recall - recall before) * precision; NaN without
    positives.

    Equal values come in together, so their order does not matter.
    """
    if not positive.any():
        return float("nan")
    table = pandas.DataFrame({"value": value, "hit": positive}).groupby("value")["hit"].agg(["sum", "size"])[::-1]
    hits, sizes = table["sum"].cumsum(), table["size"].cumsum()
    return float((table["sum"] / positive.sum() * hits / sizes).sum())
