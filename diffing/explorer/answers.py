r"""Answers of a model while latents in it are changed, one token at a time.

With the activations x_m of both models on the same tokens, latents f_j, decoders D_j^m in the units of x, the model
that answers a, and the other one b, what stands at the hook point is

    x_a  -  sum_{j ablated} f_j D_j^a  +  sum_{j exchanged} f_j (D_j^b - D_j^a)     on every token that is scored
         +  sum_{j steered} s_j max_activation_j D_j                                 at every position (`steered`)

`Change` says what is done, `changed` does it while the models run, `Pieces` makes texts of tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models import hooks
from crosscoders.text.decoding import UNFINISHED
from diffing.causal.steering import steered, steering_vector
from diffing.latents.contexts import ChosenLatents
from diffing.latents.latent_scaling import MODELS


@dataclass(frozen=True)
class Change:
    """What is done to latents of the model that answers."""

    steer: Mapping[int, float] = field(default_factory=dict)
    """Latent -> strength, in units of its largest activation in the table."""
    ablate: tuple[int, ...] = ()
    """Latents whose part is taken out."""
    exchange: tuple[int, ...] = ()
    """Latents that write with the other model's decoder."""
    decoder: str = "tuned"
    """Whose decoder steers."""

    def __post_init__(self) -> None:
        both = [j for j in self.ablate if j in self.exchange]
        if both:
            raise InputError(f"latent {both[0]} is both ablated and exchanged. Do one of the two.")
        for latents, word in ((self.ablate, "ablated"), (self.exchange, "exchanged")):
            twice = [j for j in latents if latents.count(j) > 1]
            if twice:
                raise InputError(f"latent {twice[0]} is {word} twice. Name it once.")
        if self.decoder not in MODELS:
            raise InputError(f"decoder is {self.decoder!r}; give one of {', '.join(MODELS)}.")
        wrong = [strength for strength in self.steer.values() if not np.isfinite(strength)]
        if wrong:
            raise InputError(f"a strength is {wrong[0]}; give a finite number.")

    def latents(self) -> list[int]:
        """Return the latents that are changed, each once."""
        return list(dict.fromkeys([*self.steer, *self.ablate, *self.exchange]))

    def needs_both(self) -> bool:
        """Return whether the activations of both models are read."""
        return bool(self.ablate or self.exchange)


Written = Callable[[Float[Tensor, "tokens 2 d_model"]], Float[Tensor, "tokens d_model"]]
"""Activations of both models on tokens -> what is added to those of the one that answers."""


class Edit:
    """Changes what stands at the hook point of one row by what `written` says of both models' activations.

    side: the model that answers. scored: of the prompt; every token after it is.
    """

    def __init__(self, written: Written, side: int, scored: Bool[np.ndarray, " prompt"]) -> None:
        self.written, self.side, self.scored, self.n_seen = written, side, torch.from_numpy(scored), 0

    def __call__(self, x: Float[Tensor, "*row"], other: Float[Tensor, "*row"]) -> Float[Tensor, "*row"]:
        """Return the changed activation of one step: of the whole text, or of the token after what was seen."""
        own, seen = (part.reshape(-1, x.shape[-1]) for part in (x, other))
        start = self.n_seen if len(own) == 1 else 0
        self.n_seen = start + len(own)
        change = self.written(torch.stack([seen, own] if self.side else [own, seen], dim=1)).to(x.device)
        is_scored = torch.ones(len(own), dtype=torch.bool)
        is_scored[: max(0, len(self.scored) - start)] = self.scored[start : self.n_seen]
        return torch.where(is_scored[:, None].to(x.device), own + change.to(x.dtype), own).reshape_as(x)


def written_by(crosscoder: Crosscoder, folded: Crosscoder, change: Change, side: int) -> Written:
    """Return what ablated and exchanged latents change in model `side`; crosscoder, folded: as it was trained, and in
    the units of x."""
    out, exchanged, decoder = list(change.ablate), list(change.exchange), folded.W_dec.detach()
    differences = decoder[exchanged, 1 - side] - decoder[exchanged, side]
    directions = torch.cat([-decoder[out, side], differences]).cpu()
    latents = ChosenLatents(crosscoder, out + exchanged)
    return lambda x: latents.encode(x) @ directions


@contextlib.contextmanager
def changed(
    models: tuple[Any, Any],
    hook_point: str,
    edit: Edit | None,
    vectors: list[Float[Tensor, " d_model"]],
) -> Iterator[None]:
    """Change latents in the last of the models, which run one after the other on the same tokens; while it lasts."""
    first, last = models
    with contextlib.ExitStack() as stack:
        if edit is not None:
            seen = stack.enter_context(hooks.capture(first, [hook_point]))
            stack.enter_context(hooks.replace(last, hook_point, lambda x: edit(x, seen[hook_point])))
        for vector in vectors:
            stack.enter_context(steered(last, hook_point, vector))
        yield


def steering_vectors(folded: Crosscoder, change: Change, largest: Sequence[float]) -> list[Float[Tensor, " d_model"]]:
    """Return one vector per steered latent, in the units of x; largest: activation of each latent in the table."""
    side = MODELS.index(change.decoder)
    return [
        steering_vector(folded, j, side=side, activation=strength * largest[j]) for j, strength in change.steer.items()
    ]


class Pieces:
    """Texts of the tokens of one answer, as they come; joined they are the text of all of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ids, self.given = tokenizer, list[int](), ""

    def add(self, token: int) -> str:
        """Return what a token adds; nothing while a character waits for its last byte."""
        self.ids.append(token)
        return "" if self._text().endswith(UNFINISHED) else self.rest()

    def rest(self) -> str:
        """Return what has not been given yet."""
        text = self._text()
        piece, self.given = text[len(self.given) :], text
        return piece

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
