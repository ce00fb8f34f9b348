r"""Steering: a latent's decoder added at the hook point while the model writes.

    x <- x + strength * max_activation_j * D_j^m       at every position, D_j^m = d_j^m / input_scale_m

A constant is added once to every position, so that generation with and without a cache of keys and values is the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models import hooks
from crosscoders.models.limits import require_ids
from crosscoders.text.templates import require_template


def steering_vector(crosscoder: Crosscoder, latent: int, *, side: int, activation: float) -> Float[Tensor, " d_model"]:
    """`activation` times the latent's decoder of model `side` (0 base, 1 tuned), in the units of x."""
    return activation * crosscoder.fold().W_dec[latent, side].detach()


@contextlib.contextmanager
def steered(model: Any, hook_point: str, vector: Float[Tensor, " d_model"]) -> Iterator[None]:
    """`vector` is added at every position of the hook point; also under `generate`."""
    with hooks.replace(model, hook_point, lambda x: x + vector.to(x.device, x.dtype)):
        yield


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    template: str | None = None,
) -> str:
    """Greedy answer to one user message in a chat template, default the tokenizer's, or the continuation of plain text
    where there is none.

    Raises:
        InputError: several templates and none called default; a template that refuses the prompt; an id beyond the
            model's.
    """
    if template or tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        require_template(tokenizer, template)
        try:
            inputs = tokenizer.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program, and fails as it likes
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"the chat template refuses the prompt {prompt!r}: {line}. Change --prompt.") from None
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    model = getattr(model, "original_model", model)  # in a TransformerBridge, whose own generate has other settings
    n_ids = len(model.get_input_embeddings().weight)
    require_ids(inputs["input_ids"].flatten().numpy(), n_ids, tokenizer, type(model).__name__)
    inputs = inputs.to(model.device)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    tokens = model.generate(**inputs, **settings, use_cache=use_cache)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
