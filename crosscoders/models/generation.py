"""Greedy answers and plain samples, whatever a model's folder says about generation."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Let `generate` take the likeliest token each time; of the model's own generation settings only the ids of EOS and
    padding hold, as penalties, forbidden n-grams and forced tokens change greedy answers too."""
    import transformers

    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def sampling(model: Any) -> Iterator[None]:
    """Let `generate` draw each token from the model's own distribution, temperature 1 and nothing cut, past any EOS."""
    import transformers

    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own
