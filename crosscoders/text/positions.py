"""Which tokens of a row are scored, that is cached, trained on and counted."""

import numpy as np
from jaxtyping import Bool, Int


def scored_positions(
    ids: Int[np.ndarray, " seq"], bos: int | None, *, drop_bos: bool = True, skip_first: int | None = None
) -> Bool[np.ndarray, " seq"]:
    """Return which tokens of a row are scored: with `drop_bos` no BOS, and none of the first `skip_first` positions.

    bos: the id of the beginning-of-sequence token, None where the tokenizer has none. skip_first: default 1 for a row
    that does not begin with BOS, 0 for one that does. Models attend to their first position whatever stands there, and
    its activation is an outlier (a massive activation: Sun et al. 2024, arXiv 2402.17762).
    """
    begins_with_bos = bos is not None and len(ids) > 0 and ids[0] == bos
    scored = np.ones(len(ids), dtype=bool)
    if drop_bos and bos is not None:
        scored &= ids != bos
    scored[: (0 if begins_with_bos else 1) if skip_first is None else skip_first] = False
    return scored
