"""What a model can read: ids within its embedding, and positions that it has learned. Checked before weights load."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import nn

from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.models import hooks
from crosscoders.models.names import load_auto
from crosscoders.models.skeleton import skeleton
from crosscoders.text.tokens import Rows

_POSITIONS = re.compile(r"wpe|position", re.IGNORECASE)


def require_readable(rows: Rows, models: Sequence[str], tokenizer: Any) -> None:
    """Check the ids and the lengths that occur in documents.

    Raises:
        InputError: an id beyond a model's embedding, or a position beyond its learned ones. (Beyond those that a model
            with computed positions was trained on is only said.)
    """
    longest = int(np.diff(rows.offsets).max())
    for name in models:
        text = load_auto(name, "config").get_text_config()
        require_ids(rows.ids, int(text.vocab_size), tokenizer, name)
        n_positions = getattr(text, "max_position_embeddings", None)
        if not n_positions or longest <= n_positions:
            continue
        if _learns_positions(name):
            raise InputError(
                f"a document has {longest:,} tokens, but {name!r} has learned {n_positions:,} positions and has no "
                f"others. Set --context-length {n_positions}."
            )
        say(
            f"warning: a document has {longest:,} tokens, and {name!r} was made for {n_positions:,} positions. "
            f"Set --context-length {n_positions} to stay within them."
        )


def require_ids(ids: Int[np.ndarray, " tokens"], n_ids: int, tokenizer: Any, name: str) -> None:
    """Raise InputError where an id lies beyond a model's embedding of `n_ids` rows."""
    largest = int(ids.max(initial=0))
    if largest >= n_ids:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"the data holds token {token!r} with id {largest}, but the ids of {name!r} end at {n_ids - 1}. Name the "
            "tokenizer that fits the models with --tokenizer, or take the document out."
        )


def _learns_positions(name: str) -> bool:
    modules = hooks.language_model(skeleton(name)).named_modules()
    return any(isinstance(module, nn.Embedding) and _POSITIONS.search(place) for place, module in modules)
