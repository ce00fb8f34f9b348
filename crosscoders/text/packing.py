"""Documents end to end: what stands between two of them."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from crosscoders.common.errors import InputError
from crosscoders.text.tokens import ROLES, Rows


def separated(rows: Rows, tokenizer: Any) -> Rows:
    """Return the rows, ended by EOS where `missing_borders` says so; it is template and not scored.

    Raises:
        InputError: the tokenizer has no EOS.
    """
    is_missing = missing_borders(rows.ids[rows.offsets[1:-1]], rows.ids[rows.offsets[1:-1] - 1], tokenizer)
    at = rows.offsets[1:-1][is_missing]
    offsets = rows.offsets.copy()
    offsets[1:-1] += np.cumsum(is_missing)
    offsets[-1] += len(at)
    return rows._replace(
        ids=np.insert(rows.ids, at, tokenizer.eos_token_id if len(at) else 0),
        roles=np.insert(rows.roles, at, ROLES.index("template")),
        scored=np.insert(rows.scored, at, False),
        offsets=offsets,
    )


def missing_borders(
    first_ids: Int[np.ndarray, " borders"], last_ids: Int[np.ndarray, " borders"], tokenizer: Any
) -> Bool[np.ndarray, " borders"]:
    """Return where two documents would run into each other: the next does not begin with BOS and the last does not end
    with EOS.

    first_ids: of the next document; last_ids: of the one before.

    Raises:
        InputError: there are such borders, and the tokenizer has no EOS to put there.
    """
    is_missing = np.ones(len(first_ids), dtype=bool)
    if tokenizer.bos_token_id is not None:
        is_missing &= first_ids != tokenizer.bos_token_id
    if tokenizer.eos_token_id is not None:
        is_missing &= last_ids != tokenizer.eos_token_id
    elif is_missing.any():
        raise InputError(
            "the tokenizer has no EOS to put between packed documents, which do not begin with BOS. Name one that has "
            "either, or do not pack."
        )
    return is_missing
