"""What scorers know of features, whoever reads them: activations on the tokens of labelled documents.

`Readout` holds all tokens; `heldout` splits their documents; `example_sets` cuts windows for an explainer and a judge.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

WINDOW = 32
"""Tokens of an example. Source: Delphi, the default length of its examples."""
SHORTEST = 8
"""Tokens of the shortest example, at the end of a document."""


@dataclass(frozen=True)
class Readout:
    """Activations of features, such as latents of a crosscoder or directions of an adapter, on tokens in order."""

    features: list[int]
    token_ids: Int[np.ndarray, " tokens"]
    documents: Int[np.ndarray, " tokens"]
    """Number of the document; those of one document are contiguous."""
    labels: Int[np.ndarray, " tokens"]
    """Index into `label_names`."""
    label_names: list[str]
    activations: Float[np.ndarray, "tokens features"]
    """0 where a feature does not fire."""


@dataclass(frozen=True)
class Example:
    """A window of one document, and a feature's activations in it."""

    tokens: list[str]
    activations: list[float]
    document: int
    label: str
    """Of its strongest token."""

    @property
    def active(self) -> list[int]:
        """Indices of the tokens on which the feature fires."""
        return [i for i, value in enumerate(self.activations) if value > 0]


@dataclass(frozen=True)
class ExampleSets:
    """Examples of one feature: `shown` where it fires, to name it by; the others, of held-out documents, to judge."""

    shown: list[Example]
    firing: list[Example]
    silent: list[Example]


Decode = Callable[[Sequence[int]], list[str]]
"""Token ids -> one text per token."""


def heldout(documents: Int[np.ndarray, " tokens"], seed: int) -> Bool[np.ndarray, " tokens"]:
    """Return which tokens belong to the half of the documents that is held out."""
    names, number = np.unique(documents, return_inverse=True)
    is_heldout = np.zeros(len(names), dtype=bool)
    is_heldout[np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]] = True
    return is_heldout[number]


def example_sets(
    readout: Readout, i: int, is_heldout: Bool[np.ndarray, " tokens"], decode: Decode, *, n_shown: int, n_scored: int,
    seed: int,
) -> ExampleSets:  # fmt: skip
    """Return examples of the i-th feature, those where it fires evenly over their ranks by largest activation.

    `firing` and `silent` are equally many, at most `n_scored`; both are empty where the feature fires in no held-out
    window or in all.
    """
    bounds = _windows(readout.documents)
    values = readout.activations[:, i]
    peaks = np.array([values[start:stop].max() for start, stop in bounds])
    of_heldout = np.array([is_heldout[start] for start, _ in bounds], dtype=bool)
    order = np.argsort(-peaks, kind="stable").tolist()
    shown = [w for w in order if peaks[w] > 0 and not of_heldout[w]]
    firing = [w for w in order if peaks[w] > 0 and of_heldout[w]]
    candidates = np.nonzero((peaks <= 0) & of_heldout)[0]
    silent = np.random.default_rng([seed, readout.features[i]]).permutation(candidates).tolist()
    n = min(n_scored, len(firing), len(silent))
    cut = [
        [_example(readout, i, *bounds[w], decode) for w in chosen]
        for chosen in (_evenly(shown, n_shown), _evenly(firing, n), silent[:n])
    ]
    return ExampleSets(*cut)


def _windows(documents: Int[np.ndarray, " tokens"]) -> list[tuple[int, int]]:
    """Return start and stop of every window."""
    edges = [0, *(np.nonzero(np.diff(documents))[0] + 1).tolist(), len(documents)]
    windows = []
    for first, last in itertools.pairwise(edges):
        starts = range(first, last, WINDOW)
        windows += [(start, min(start + WINDOW, last)) for start in starts if last - start >= SHORTEST]
    return windows


def _evenly(ranked: list[int], n: int) -> list[int]:
    """Return n entries (or all) at equal distances."""
    return [ranked[k] for k in np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int)]


def _example(readout: Readout, i: int, start: int, stop: int, decode: Decode) -> Example:
    values = readout.activations[start:stop, i]
    label = readout.label_names[int(readout.labels[start + int(values.argmax())])]
    tokens = decode(readout.token_ids[start:stop].tolist())
    return Example(tokens, values.tolist(), int(readout.documents[start]), label)
