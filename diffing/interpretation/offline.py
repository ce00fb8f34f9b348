"""Predictors of "fires here" that need no model: one token, one token shortly before, one label.

Each is chosen on half of the documents, from all values that it may have, and measured on the other half. The null
does the same, choice included, with activations from elsewhere: documents in another order, and all of it shifted.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from crosscoders.common.statistics import bootstrap_interval, resample
from diffing.interpretation.examples import Readout, heldout

REACH = 8
"""Tokens before the current one in which `context` looks for its token."""
DRAWS = 199
"""Of the null; the smallest p is 1 / 200."""
FEWEST = 10
"""Tokens on which a feature must fire, on either side of the split, to be predicted."""
LEVEL = 0.05
"""Of all predictors of one feature together."""
NOTHING = -1


class Prediction(NamedTuple):
    """The best predictor of one kind for one feature, on held-out documents."""

    kind: str
    """`token`: the token itself; `context`: one of the `REACH` before it; `label`: of its document, or template."""
    value: int
    """Token id or index of a label."""
    balanced_accuracy: float
    low: float | None
    high: float | None
    """95% over documents; None where a resample lacks tokens of one side."""
    auroc: float | None
    """Of the firing rate that each value has in the other documents; None for `context`, where a token has several."""
    n_firing: int
    n_silent: int
    null_mean: float
    null_high: float
    """Mean and 95th percentile of the balanced accuracy of the null."""
    p: float
    """Share of null draws that are at least as good, the data among them."""

    @property
    def beats_null(self) -> bool:
        """Whether p is at most `LEVEL` over the number of kinds (Bonferroni)."""
        return self.p <= LEVEL / len(KINDS)


KINDS = ("token", "context", "label")


class _Part:
    """One side of the split: values of each predictor, on its tokens alone, and how often each stands there."""

    def __init__(self, readout: Readout, chosen: Bool[np.ndarray, " tokens"]) -> None:
        self.documents = readout.documents[chosen]
        tokens = readout.token_ids[chosen].astype(np.int64)
        self.codes = {
            "token": tokens[:, None],
            "context": _before(tokens, self.documents),
            "label": readout.labels[chosen].astype(np.int64)[:, None],
        }
        widths = {"token": int(readout.token_ids.max()) + 1, "label": len(readout.label_names)}
        self.widths = widths | {"context": widths["token"]}
        everything = np.arange(len(tokens))
        self.totals = {kind: self.counts(kind, everything) for kind in KINDS}
        self.n = len(tokens)

    def counts(self, kind: str, tokens: Int[np.ndarray, " chosen"]) -> Int[np.ndarray, " values"]:
        """Return on how many of the given tokens each value of a predictor holds."""
        codes = self.codes[kind][tokens].ravel()
        return np.bincount(codes[codes != NOTHING], minlength=self.widths[kind])

    def moved(self, rng: np.random.Generator) -> Int[np.ndarray, " tokens"]:
        """Return where each token's activation goes in one null draw."""
        edges = np.concatenate([[0], np.nonzero(np.diff(self.documents))[0] + 1, [self.n]])
        order = rng.permutation(len(edges) - 1)
        source = np.concatenate([np.arange(edges[k], edges[k + 1]) for k in order])
        target = np.empty(self.n, dtype=np.int64)
        target[np.roll(source, int(rng.integers(self.n)))] = np.arange(self.n)
        return target


def predictions(readout: Readout, *, seed: int = 0, draws: int = DRAWS) -> dict[int, list[Prediction]]:
    """Return the best predictor of each kind for every feature; none for one that fires or is silent too seldom."""
    is_heldout = heldout(readout.documents, seed)
    if is_heldout.all() or not is_heldout.any():
        return {feature: [] for feature in readout.features}
    parts = (_Part(readout, ~is_heldout), _Part(readout, is_heldout))
    fires = [
        [np.nonzero(column > 0)[0] for column in readout.activations[side].T] for side in (~is_heldout, is_heldout)
    ]
    rng = np.random.default_rng([seed, 1])
    moves = [tuple(part.moved(rng) for part in parts) for _ in range(draws)]
    documents = _document_numbers(parts[1].documents)
    weights = resample(int(documents.max()) + 1, seed)
    listed: dict[int, list[Prediction]] = {}
    for feature, fit, held in zip(readout.features, *fires, strict=True):
        enough = all(FEWEST <= len(f) <= part.n - FEWEST for f, part in zip((fit, held), parts, strict=True))
        listed[feature] = []
        for kind in KINDS if enough else ():
            value, score = _best(kind, parts, fit, held)
            null = np.array([_best(kind, parts, move[0][fit], move[1][held])[1] for move in moves])
            low, high = _interval(parts[1], kind, value, held, documents, weights)
            prediction = Prediction(
                kind=kind,
                value=value,
                balanced_accuracy=score,
                low=low,
                high=high,
                auroc=_auroc(kind, parts, fit, held),
                n_firing=len(held),
                n_silent=parts[1].n - len(held),
                null_mean=float(null.mean()),
                null_high=float(np.percentile(null, 95)),
                p=(1 + int((null >= score).sum())) / (draws + 1),
            )
            listed[feature].append(prediction)
    return listed


def _best(
    kind: str, parts: tuple[_Part, _Part], fit: Int[np.ndarray, " fit"], held: Int[np.ndarray, " held"]
) -> tuple[int, float]:
    """Return the value with the best balanced accuracy on the first part, and what it has on the second."""
    value = int(_balanced(parts[0], kind, fit).argmax())
    return value, float(_balanced(parts[1], kind, held)[value])


def _balanced(part: _Part, kind: str, firing: Int[np.ndarray, " firing"]) -> Float[np.ndarray, " values"]:
    """Return the mean of the shares of firing and of silent tokens that "fires where the value is" gets right."""
    hits = part.counts(kind, firing)
    false = part.totals[kind] - hits
    return 0.5 * (hits / len(firing) + 1 - false / (part.n - len(firing)))


def _auroc(
    kind: str, parts: tuple[_Part, _Part], fit: Int[np.ndarray, " fit"], held: Int[np.ndarray, " held"]
) -> float | None:
    """Return how often a firing token has a value of higher rate than a silent one; ties count half."""
    if kind == "context":
        return None
    base = len(fit) / parts[0].n  # one token of prior, at the mean rate
    rates = (parts[0].counts(kind, fit) + base) / (parts[0].totals[kind] + 1)
    _, rank = np.unique(rates, return_inverse=True)
    hits = np.bincount(rank, weights=parts[1].counts(kind, held))
    false = np.bincount(rank, weights=parts[1].totals[kind]) - hits
    below = np.cumsum(false) - false
    return float((hits * (below + false / 2)).sum() / (hits.sum() * false.sum()))


def _interval(
    part: _Part, kind: str, value: int, firing: Int[np.ndarray, " firing"], documents: Int[np.ndarray, " tokens"],
    weights: Float[np.ndarray, "resamples documents"],
) -> tuple[float | None, float | None]:  # fmt: skip
    fires = np.zeros(part.n, dtype=bool)
    fires[firing] = True
    says = (part.codes[kind] == value).any(axis=1)
    n = weights.shape[1]
    sums = [
        weights @ np.bincount(documents[mask], minlength=n).astype(float)
        for mask in (fires & says, fires, ~fires & ~says, ~fires)
    ]
    if not ((sums[1] > 0).all() and (sums[3] > 0).all()):
        return None, None
    return bootstrap_interval(0.5 * (sums[0] / sums[1] + sums[2] / sums[3]))


def _before(
    tokens: Int[np.ndarray, " tokens"], documents: Int[np.ndarray, " tokens"]
) -> Int[np.ndarray, "tokens back"]:
    """Return the different tokens among the `REACH` before each, in its document; others are `NOTHING`."""
    columns = np.full((len(tokens), REACH), NOTHING, dtype=np.int64)
    for back in range(1, min(REACH, len(tokens) - 1) + 1):
        same = documents[back:] == documents[:-back]
        columns[back:, back - 1] = np.where(same, tokens[:-back], NOTHING)
    columns.sort(axis=1)
    columns[:, 1:][columns[:, 1:] == columns[:, :-1]] = NOTHING
    return columns


def _document_numbers(documents: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
    return np.unique(documents, return_inverse=True)[1]
