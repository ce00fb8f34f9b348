r"""Phrases that one set of texts has more often than another: log odds with a prior, one error rate for all of them.

Texts come in pairs (same prompt). y is the number of texts with the phrase, n of texts, and with the share
s = (y + y') / 2n over both sets and a prior that weighs as much as one set, alpha = n s, beta = n - alpha:

    delta = log[(y + alpha) / (n - y + beta)] - log[(y' + alpha) / (n - y' + beta)]
    z = delta / sqrt(1 / (y + alpha) + 1 / (y' + alpha))

The threshold is the (1 - false_rate) quantile of the largest z over all phrases when the texts of each pair change
sides at random: the chance of any false phrase, where the two sets are exchangeable. Source: Monroe, Colaresi and
Quinn 2008, eq. 16 to 22; differs: texts with a phrase are counted, not its occurrences, and the threshold is that of
permutations (Westfall and Young 1993) instead of 1.96.

Reading order: `words` and `ngrams` of a text, `distinctive_phrases` of two sets.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float

LONGEST = 12
"""Words in a phrase; punctuation counts as a word."""
FEWEST = 3
"""Texts of both sets together that a phrase must be in to be tested."""
PERMUTATIONS = 2000
_CHUNK = 200


class Phrase(NamedTuple):
    """A phrase that the first set has more often."""

    text: str
    """As it stands in one of its texts."""
    z: float
    n_texts: int
    """Texts of the first set with it."""
    n_other: int
    """Texts of the other set with it."""
    examples: list[int]
    """Numbers of the texts of the first set with it."""


class Comparison(NamedTuple):
    """Phrases of one set against another."""

    phrases: list[Phrase]
    """The most distinctive first."""
    threshold: float
    n_tested: int


def words(text: str) -> list[re.Match[str]]:
    """Return words and single marks of punctuation, where they stand."""
    return list(re.finditer(r"\w+|[^\w\s]", text))


def ngrams(text: str) -> dict[tuple[str, ...], str]:
    """Return the phrases of 1 to LONGEST words of a text, each as it stands there; case does not separate them."""
    places = words(text)
    lowered = [place[0].lower() for place in places]
    found: dict[tuple[str, ...], str] = {}
    for i in range(len(places)):
        for j in range(i + 1, min(i + LONGEST, len(places)) + 1):
            found.setdefault(tuple(lowered[i:j]), text[places[i].start() : places[j - 1].end()])
    return {key: shown for key, shown in found.items() if any(word[0].isalnum() for word in key)}


def distinctive_phrases(
    texts: Sequence[str], others: Sequence[str], *, false_rate: float = 0.05, seed: int = 0, maximal: bool = True
) -> Comparison:
    """Return the phrases that `texts` have more often than `others`, whose entries are paired.

    maximal: leave out those that stand inside a longer one with at least half of their texts.
    """
    assert len(texts) == len(others)
    both = [ngrams(text) for text in [*texts, *others]]
    counts = Counter(key for found in both for key in found)
    keys = [key for key, n in counts.items() if n >= FEWEST]
    if not keys:
        return Comparison([], float("inf"), 0)
    column = {key: i for i, key in enumerate(keys)}
    first, other = (_presence(part, column) for part in (both[: len(texts)], both[len(texts) :]))
    total = np.asarray((first + other).sum(axis=0)).ravel().astype(np.float64)
    counted = np.asarray(first.sum(axis=0)).ravel().astype(np.float64)
    z = _z(counted[None], total, len(texts))[0]
    threshold = _threshold((first - other).tocsr(), total, len(texts), false_rate, seed)
    passing = [i for i in np.argsort(-z, kind="stable") if z[i] > threshold]
    members = {keys[i]: set(first[:, [i]].nonzero()[0].tolist()) for i in passing}
    phrases = [
        Phrase(both[min(members[keys[i]])][keys[i]], float(z[i]), int(counted[i]), int(total[i] - counted[i]),
               sorted(members[keys[i]]))
        for i in passing
        if not maximal or not any(_is_part(keys[i], longer, members) for longer in members)
    ]  # fmt: skip
    return Comparison(phrases, threshold, len(keys))


def _is_part(key: tuple[str, ...], longer: tuple[str, ...], members: dict[tuple[str, ...], set[int]]) -> bool:
    """Whether a phrase stands inside a longer one that has at least half of its texts."""
    if len(longer) <= len(key) or 2 * len(members[longer] & members[key]) < len(members[key]):
        return False
    return any(longer[i : i + len(key)] == key for i in range(len(longer) - len(key) + 1))


def _presence(found: list[dict[tuple[str, ...], str]], column: dict[tuple[str, ...], int]) -> scipy.sparse.csr_array:
    pairs = [(row, column[key]) for row, keys in enumerate(found) for key in keys if key in column]
    rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
    shape = (len(found), len(column))
    return scipy.sparse.csr_array((np.ones(len(pairs)), (np.array(rows, int), np.array(columns, int))), shape=shape)


def _z(
    counted: Float[np.ndarray, "sides phrases"], total: Float[np.ndarray, " phrases"], n: int
) -> Float[np.ndarray, "sides phrases"]:
    """Return z of each phrase; `counted` texts of the first set have it, `total` of both."""
    alpha = total / 2
    first, other = counted + alpha, total - counted + alpha
    delta = np.log(first / (2 * n - first + 1e-9)) - np.log(other / (2 * n - other + 1e-9))
    return np.asarray(delta / np.sqrt(1 / first + 1 / other))


def _threshold(
    differences: scipy.sparse.csr_array, total: Float[np.ndarray, " phrases"], n: int, false_rate: float, seed: int
) -> float:
    """Return the z that the largest of all phrases exceeds with chance `false_rate` when pairs change sides."""
    generator = np.random.default_rng(seed)
    largest: list[float] = []
    for _ in range(0, PERMUTATIONS, _CHUNK):
        signs = generator.choice([-1.0, 1.0], size=(_CHUNK, n))
        counted = (total + (differences.T @ signs.T).T) / 2
        largest += _z(counted, total, n).max(axis=1).tolist()
    return float(np.quantile(largest, 1 - false_rate, method="higher"))
