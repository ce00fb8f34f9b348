"""Logit lens: the tokens that a latent's decoder writes for, read with each model's own final norm and unembedding."""

from typing import Any

import torch

from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import read_out
from crosscoders.text.decoding import token_text
from diffing.latents.latent_scaling import MODELS


@torch.no_grad()
def logit_lens(
    crosscoder: Crosscoder, pair: ModelPair, latents: list[int], *, n_tokens: int = 10
) -> dict[str, dict[str, list[str]]]:
    """Return per latent and model the tokens of largest logit when D_j^m, in the units of x, is the residual stream
    after the last layer. `pair` holds whole models.

    Only a direct reading: what layers above the hook point would make of the direction is left out.
    """
    decoder = crosscoder.fold().W_dec[latents]
    tokenizer: Any = pair.info.tokenizer
    tokens_of: dict[str, dict[str, list[str]]] = {str(latent): {} for latent in latents}
    for m, (name, model) in enumerate(zip(MODELS, pair.models, strict=True)):
        weight = next(model.parameters())
        logits = read_out(model, decoder[:, m].to(weight.device, weight.dtype))
        for latent, best in zip(latents, logits[:, : len(tokenizer)].topk(n_tokens).indices, strict=True):
            tokens_of[str(latent)][name] = [token_text(tokenizer, int(token)) for token in best]
    return tokens_of
