r"""Diff mining: the tokens whose logits the fine-tune raised most on ordinary text, by frequency and by topic.

At each position the tokens of the largest differences are listed (`observation`). A token's frequency is the share of
positions that list it; topics are the components of a non-negative factorisation V = W H (Frobenius norm, scikit-learn)
of how often each document (rows of V) lists each token. Source: the diff mining of the diffing toolkit, which lists the
100 largest of each position.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from crosscoders.common.errors import EnvironmentFault, InputError
from crosscoders.text.decoding import token_text
from diffing.baselines.observation import Observed


class Mined(NamedTuple):
    """One list of tokens."""

    name: str
    """`frequency`, or `topic_<number>`."""
    ids: Int[np.ndarray, " tokens"]
    weights: Float[np.ndarray, " tokens"]
    """Share of positions, or weight in the topic; largest first."""

    def texts(self, tokenizer: Any, n: int) -> list[str]:
        """Return the text of the first `n` tokens."""
        return [token_text(tokenizer, int(token)) for token in self.ids[:n]]


def token_frequencies(observed: Observed, n_ids: int) -> Float[np.ndarray, " vocab"]:
    """Return the share of positions at which each token is among those that gained most; a gain of 0 is none."""
    listed = observed.gained_ids[observed.gains > 0]
    return np.bincount(listed.numpy(), minlength=n_ids) / len(observed.kl)


def by_frequency(observed: Observed, n_ids: int, null: Float[np.ndarray, " vocab"] | None = None) -> Mined:
    """Return the tokens in the order of their frequency; `null`: frequencies of a null pair, which are taken off."""
    frequencies = token_frequencies(observed, n_ids)
    weights = frequencies if null is None else frequencies - null
    order = np.argsort(-weights, kind="stable")
    order = order[weights[order] > 0]
    return Mined("frequency", order, weights[order])


def by_topic(observed: Observed, n_ids: int, *, n_topics: int = 3, seed: int = 0) -> list[Mined]:
    """Return the tokens of each topic in the order of their weight.

    Raises:
        EnvironmentFault: scikit-learn is not installed.
        InputError: fewer documents than topics.
    """
    try:
        from sklearn.decomposition import NMF
    except ImportError:
        raise EnvironmentFault(
            "topics of diff mining need scikit-learn. Run: pip install 'model-diffing[topics]'"
        ) from None
    import scipy.sparse

    _, documents = np.unique(observed.documents.numpy(), return_inverse=True)
    n_documents = int(documents.max()) + 1
    if n_documents < n_topics:
        raise InputError(f"{n_topics} topics need as many documents; got {n_documents}. Raise --n-tokens.")
    at = (observed.gains > 0).numpy()
    rows = np.broadcast_to(documents[:, None], at.shape)[at]
    counts = scipy.sparse.csr_array(
        (np.ones(len(rows)), (rows, observed.gained_ids.numpy()[at])), shape=(n_documents, n_ids)
    )
    factors = NMF(n_topics, init="nndsvda", random_state=seed, max_iter=500, tol=1e-3).fit(counts).components_
    orders = [np.argsort(-topic, kind="stable") for topic in factors]
    listed = zip(factors, orders, strict=True)
    return [Mined(f"topic_{number}", order, topic[order]) for number, (topic, order) in enumerate(listed)]
