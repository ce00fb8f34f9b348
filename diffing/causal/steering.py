r"""Steering: a latent's decoder added at the hook point while the model writes.

    x <- x + strength * max_activation_j * D_j^m       at every position, D_j^m = d_j^m / input_scale_m

A constant is added once to every position, so that generation with and without a cache of keys and values is the same;
a TransformerBridge generates without one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models import hooks
from crosscoders.models.generation import greedy
from crosscoders.models.limits import require_ids
from crosscoders.text.refusals import Refused
from crosscoders.text.settings import TEMPLATE_DATE
from crosscoders.text.tokens import tokenize_prompt


def steering_vector(crosscoder: Crosscoder, latent: int, *, side: int, activation: float) -> Float[Tensor, " d_model"]:
    """Return `activation` times the latent's decoder of model `side` (0 base, 1 tuned), in the units of x."""
    folded = crosscoder if crosscoder.is_folded else crosscoder.fold()
    return activation * folded.W_dec[latent, side].detach()


@contextlib.contextmanager
def steered(model: Any, hook_point: str, vector: Float[Tensor, " d_model"]) -> Iterator[None]:
    """Add `vector` at every position of the hook point; also under `generate`."""
    with hooks.replace(model, hook_point, lambda x: x + vector.to(x.device, x.dtype)):
        yield


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    template: str | None = None,
    date: str = TEMPLATE_DATE,
) -> str:
    """Return the greedy answer to one user message in the chat template, or the continuation of plain text where there
    is none. template, date: in place of the tokenizer's own, and what it takes for today.

    Raises:
        InputError: several templates and none called default; a template that refuses the prompt; an id beyond the
            model's.
    """
    core = hooks.core_model(model)  # in a TransformerBridge, whose own generate has other settings
    try:
        tokens = np.array(tokenize_prompt(tokenizer, prompt, template, date=date))
    except Refused as refused:
        raise InputError(f"the chat template refuses the prompt {prompt!r}: {refused}") from None
    require_ids(tokens, len(core.get_input_embeddings().weight), tokenizer, type(core).__name__)
    ids = torch.tensor(tokens[None], device=core.device)
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    with greedy(core):
        # transformer-lens 3.9 hands its attention no cache of transformers 5.24: each token would see itself alone.
        written = core.generate(
            ids, attention_mask=torch.ones_like(ids), **settings, use_cache=not hasattr(model, "hook_dict")
        )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()
