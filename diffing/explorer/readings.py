"""What a prompt makes the models do, token by token.

`read_tokens` runs the models of a kind once: what fires on each token, what each model expects next, and
KL(tuned || base) between these predictions.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.models import predictions
from crosscoders.models.resume import head_alone
from crosscoders.text.decoding import token_text, token_texts
from crosscoders.text.padding import make_batch
from diffing.explorer.kinds import Fired, Kind

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
    """Whether what is shown reads it; the beginning of sequence a crosscoder, for one, does not."""
    kl: float
    """KL(tuned || base) of what follows this token, nats."""
    latents: list[int]
    """What fires on it, by the length of what is written (of a crosscoder: differently in the two models), longest
    first: latents, or rows of directions.parquet or pieces.parquet."""
    activations: list[float]
    lengths: list[list[float]]
    """Of what each writes, in the order of `Session.form.bars`."""
    expects: dict[str, list[Guess]]
    """What each model expects next."""

    @property
    def base(self) -> list[Guess]:
        """What the base model expects next."""
        return self.expects["base"]

    @property
    def tuned(self) -> list[Guess]:
        """What the tuned model expects next."""
        return self.expects["tuned"]


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
    kind: Kind, texts: Texts, ids: Int[np.ndarray, " seq"], scored: Bool[np.ndarray, " seq"]
) -> list[TokenReading]:
    """Return one reading per token."""
    names = kind.form.models
    passed = kind.pass_over(make_batch([ids], [scored], np.arange(1), 0).to(kind.pair.device))
    kls: list[float] = []
    guesses: dict[str, list[list[Guess]]] = {name: [] for name in names}
    for span in torch.arange(len(ids)).split(_CHUNK):
        log_p = {}
        for name, final in zip(names, passed.finals, strict=True):
            with kind.on(name), head_alone(kind.model(name)) as to_logits:
                log_p[name] = predictions.log_probs(to_logits(final[span])[:, : texts.n_ids])
            guesses[name] += _guesses(texts, log_p[name])
        kls += predictions.kl(log_p["tuned"], log_p["base"]).clamp(min=0).tolist()
    written = texts.of(ids.tolist())
    return [
        TokenReading(
            int(token), written[place], fired is not None, kls[place], *(fired or Fired([], [], [])),
            {name: guesses[name][place] for name in names},
        )
        for place, (token, fired) in enumerate(zip(ids, passed.fired, strict=True))
    ]  # fmt: skip


def _guesses(texts: Texts, log_p: Float[Tensor, "tokens vocab"]) -> list[list[Guess]]:
    best = log_p.exp().topk(min(N_GUESSES, log_p.shape[1]))
    return [
        [Guess(texts.alone(token), p) for token, p in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
