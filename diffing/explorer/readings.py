"""What a prompt makes both models do, token by token.

`read_tokens` runs both models once: which latents fire on each token, what both models expect next, and
KL(tuned || base) between these predictions.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.models import predictions
from crosscoders.models.resume import ResumableModel
from crosscoders.text.decoding import token_text, token_texts
from crosscoders.text.padding import make_batch
from diffing.causal.sets import Exchange

N_GUESSES = 5
_CHUNK = 64
"""Tokens whose logits are held at once: 64 MiB for each model at 256,000 ids."""


class Guess(NamedTuple):
    """A next token, and how likely a model holds it."""

    text: str
    probability: float


class TokenReading(NamedTuple):
    """One token of a prompt. Anybody may have written its text."""

    id: int
    text: str
    is_scored: bool
    """Whether the crosscoder reads it; the beginning of sequence, for one, it does not."""
    kl: float
    """KL(tuned || base) of what follows this token, nats."""
    latents: list[int]
    """Latents that fire on it, by the length of what they write differently in the two models, longest first."""
    activations: list[float]
    base: list[Guess]
    """What the base model expects next."""
    tuned: list[Guess]


class Texts:
    """Texts of the tokens of a pair, of which ids from `n_ids` on are never expected."""

    def __init__(self, tokenizer: Any, n_ids: int) -> None:
        self.tokenizer, self.n_ids = tokenizer, n_ids
        self._alone: dict[int, str] = {}

    def of(self, ids: list[int]) -> list[str]:
        """Return one text per token of a text."""
        return token_texts(self.tokenizer, ids)

    def alone(self, token: int) -> str:
        """Return the text of a token that may stand anywhere."""
        if token not in self._alone:
            self._alone[token] = token_text(self.tokenizer, token)
        return self._alone[token]


@torch.inference_mode()
def read_tokens(
    models: list[ResumableModel],
    exchange: Exchange,
    lengths: Float[Tensor, " dict_size"],
    texts: Texts,
    ids: Int[np.ndarray, " seq"],
    scored: Bool[np.ndarray, " seq"],
) -> list[TokenReading]:
    """Return one reading per token; models: base and tuned, whole. lengths: of each latent's decoder
    difference."""
    batch = make_batch([ids], [scored], np.arange(1), 0).to(models[0].device)
    states = [model.run(batch) for model in models]
    fired = _firing(exchange, lengths, torch.stack([state.activation[batch.scored] for state in states], dim=1))
    kls: list[float] = []
    guesses: tuple[list[list[Guess]], list[list[Guess]]] = ([], [])
    for span in torch.arange(len(ids)).split(_CHUNK):
        base, tuned = (
            predictions.log_probs(model.logits(state.final[0, span])[:, : texts.n_ids])
            for model, state in zip(models, states, strict=True)
        )
        kls += predictions.kl(tuned, base).clamp(min=0).tolist()
        for listed, log_p in zip(guesses, (base, tuned), strict=True):
            listed += _guesses(texts, log_p)
    following = iter(fired)
    return [
        TokenReading(int(token), text, bool(is_scored), kl, *(next(following) if is_scored else ([], [])), base, tuned)
        for token, text, is_scored, kl, base, tuned in zip(
            ids, texts.of(ids.tolist()), scored, kls, *guesses, strict=True
        )
    ]


def _firing(
    exchange: Exchange, lengths: Float[Tensor, " dict_size"], x: Float[Tensor, "tokens n_models d_model"]
) -> list[tuple[list[int], list[float]]]:
    """Return the latents of each scored token and their activations, in the order in which they are listed."""
    if not len(x):
        return []
    fired = []
    for entries in exchange.take_apart(x, torch.zeros(len(x), dtype=torch.bool)).entries:
        order = torch.argsort(entries.values * lengths[entries.latents], descending=True)
        by_token: list[tuple[list[int], list[float]]] = [([], []) for _ in range(entries.n_tokens)]
        listed = zip(*(part[order].tolist() for part in (entries.tokens, entries.latents, entries.values)), strict=True)
        for token, latent, value in listed:
            by_token[token][0].append(latent)
            by_token[token][1].append(value)
        fired += by_token
    return fired


def _guesses(texts: Texts, log_p: Float[Tensor, "tokens vocab"]) -> list[list[Guess]]:
    best = log_p.exp().topk(min(N_GUESSES, log_p.shape[1]))
    return [
        [Guess(texts.alone(token), p) for token, p in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
