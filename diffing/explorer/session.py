"""`Session`: both models of a run, live.

session = diffing.Session("runs/demo/run")
session.latents("Who are you?")                    which latents fire on each token, and the KL between the models
session.latent(339)                                what is known of a latent
"".join(session.answer("Who are you?", ablate=[339]))
"""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from crosscoders.common.errors import InputError
from crosscoders.models import hooks
from crosscoders.models.limits import require_ids
from crosscoders.models.names import load_auto, quiet_transformers
from crosscoders.models.pair import ModelPair, inspect_pair
from crosscoders.text.positions import scored_positions
from crosscoders.text.refusals import Refused
from crosscoders.text.templates import Message
from crosscoders.text.tokens import read_template, tokenize_prompt, tokenize_text
from diffing.causal.patching import load_whole
from diffing.explorer.answers import Change, Pieces
from diffing.explorer.kinds import Answering, Form, Kind, require_changes, require_numbers
from diffing.explorer.opening import found, load_kind, pair_of, require_same_models
from diffing.explorer.readings import Texts, TokenReading, read_tokens
from diffing.samples.amplified import decode_steps, stop_ids

Prompt = str | list[Message]
CUT = 0.05
"""Amplified answers take no token below this share of the largest probability, as `diffing say`."""


class Session:
    """Both models of a run, in memory. Several threads may use one; the models serve one of them at a time.

    run: a folder of a crosscoder after `diffing scale`, or of `diffing topk-lora fit`, `diffing sae` or `diffing
    decompose`, or one that holds such folders. cache: whose models a crosscoder uses; default: the one that it was
    trained on. show: what is looked at, one of `kinds`; default: the first.

    Raises:
        InputError: it is no such folder, or what it holds and the models do not belong together.
    """

    def __init__(
        self, run: str | Path, cache: str | Path | None = None, *, show: str | None = None, device: str = "auto",
        model_dtype: str = "auto",
    ) -> None:  # fmt: skip
        self.folders, self._cache = found(run), None if cache is None else str(cache)
        self.kinds = list(self.folders)
        """Names of what the run holds, the first of which is looked at where nothing else is asked for."""
        self.show = self._named(show)
        self.source = pair_of(self.show, self.folders[self.show], self._cache)
        source = self.source
        self.info = inspect_pair(source.base, source.tuned, [source.hook_point], tokenizer=source.tokenizer)
        self.context = _context(self.info.models())
        self._settings = (device, model_dtype)
        self.texts = Texts(self.info.tokenizer, self.info.n_ids)
        self.lock = threading.Lock()
        self._opening = threading.Lock()
        self._kinds: dict[str, Kind] = {}
        self._pages: dict[tuple[str, int], dict[str, Any]] = {}
        self.kind()

    @functools.cached_property
    def pair(self) -> ModelPair:
        """Both models, whole."""
        return load_whole(self.info, self.source.hook_point, *self._settings)

    def kind(self, show: str | None = None) -> Kind:
        """Return what is looked at, loaded when it is first asked for.

        Raises:
            InputError: the run has none of that name, or one of other models; as opening it.
        """
        name = self._named(show)
        with self._opening:
            if name not in self._kinds:
                folder = self.folders[name]
                if name != self.show:
                    require_same_models(self.source, pair_of(name, folder, self._cache), name)
                with self.lock, quiet_transformers():
                    self._kinds[name] = load_kind(name, folder, self._cache, lambda: self.pair)
        return self._kinds[name]

    @property
    def form(self) -> Form:
        """Words of what is looked at: its models, what is listed of each, what may be changed."""
        return self.kind().form

    def _named(self, show: str | None) -> str:
        if show is None:
            return getattr(self, "show", self.kinds[0])
        if show not in self.kinds:
            raise InputError(f"show is {show!r}; the run has {', '.join(self.kinds)}.")
        return show

    def latents(self, prompt: Prompt, *, is_plain: bool = False, show: str | None = None) -> list[TokenReading]:
        """Return what fires on each token of a prompt, and how far the predictions of the models differ there.

        prompt: one user message, in the chat template where there is one; or a chat, a list of messages with `role`
        and `content`. is_plain: text without the template. show: one of `kinds`, in place of the session's.

        Raises:
            InputError: the prompt is empty, longer than what the models read, or refused by the template.
        """
        kind = self.kind(show)
        ids, scored = self._tokens(prompt, is_plain, kind)
        with self.lock, quiet_transformers():
            return read_tokens(kind, self.texts, ids, scored)

    def latent(self, latent: int, *, show: str | None = None) -> dict[str, Any]:
        """Return what is known of a latent, as plain data: values, verdict and why, examples, histogram of activations,
        lens of both decoders, twins, sets of `diffing causal` that it is in. docs/guide/explore.md lists the fields.

        Raises:
            InputError: there is no such latent.
        """
        kind, name = self.kind(show), self._named(show)
        require_numbers([latent], kind)
        if (name, latent) not in self._pages:
            with self.lock, quiet_transformers():
                self._pages[name, latent] = kind.page(latent)
        return self._pages[name, latent]

    def answer(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        steer: Mapping[int, float] | None = None,
        ablate: Sequence[int] = (),
        exchange: Sequence[int] = (),
        decoder: str = "tuned",
        amplify: float = 0.0,
        max_new_tokens: int = 64,
        is_plain: bool = False,
        show: str | None = None,
    ) -> Iterator[str]:
        """Return the pieces of a greedy answer, as they come; the models are free between two of them.

        model: the one that answers, of `form.models`; default: the last of them. steer: latent -> strength, in units of
        `form.unit`, of a crosscoder with the decoder of model `decoder`. ablate: latents whose part is taken out.
        exchange: latents that write as in the other model: with its decoder, or an SAE's with its activation. amplify:
        how much of the difference of both models' log-probabilities is added to the answering model's; 0 is that model
        alone. prompt, is_plain, show: as in `latents`.

        Raises:
            InputError: as `latents`; a latent, a strength or a name that does not exist; a chat that ends with an
                answer.
        """
        kind, change = self.kind(show), Change(dict(steer or {}), tuple(ablate), tuple(exchange), decoder)
        name = kind.form.models[-1] if model is None else model
        if name not in kind.form.models:
            raise InputError(f"model is {name!r}; give one of {', '.join(kind.form.models)}.")
        if not 0 <= amplify <= 100:
            raise InputError(f"amplify is {amplify}; give a number from 0 to 100.")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; give a number from 1.")
        if isinstance(prompt, list) and prompt and prompt[-1].get("role") == "assistant":
            raise InputError("the chat ends with an answer. End it with a message of the user.")
        require_changes(change, kind)
        ids, scored = self._tokens(prompt, is_plain, kind)
        n_new = max_new_tokens if self.context is None else min(max_new_tokens, self.context - len(ids))
        return self._pieces(ids, kind.answering(change, name, scored, is_amplified=amplify > 0), amplify, n_new)

    def _pieces(self, ids: Int[np.ndarray, " seq"], answering: Answering, amplify: float, n_new: int) -> Iterator[str]:
        ends = stop_ids(self.info.tokenizer, [hooks.core_model(model) for model in self.pair.models])
        steps = decode_steps(answering.models, [ids.tolist()], strength=amplify, cut=CUT, n_ids=self.info.n_ids)
        pieces = Pieces(self.info.tokenizer)
        for _ in range(n_new):
            with self.lock, quiet_transformers(), answering.during():
                (token,) = next(steps).tokens
            if token in ends:
                break
            if piece := pieces.add(token):
                yield piece
        if piece := pieces.rest():
            yield piece

    def _tokens(
        self, prompt: Prompt, is_plain: bool, kind: Kind
    ) -> tuple[Int[np.ndarray, " seq"], Bool[np.ndarray, " seq"]]:
        """Return the ids of a prompt, and which of them are scored."""
        if not prompt:
            raise InputError("the prompt is empty. Write something.")
        tokenizer, config = self.info.tokenizer, kind.data
        if is_plain and not isinstance(prompt, str):
            raise InputError("a chat has no plain text. Give a text, or leave is_plain out.")
        try:
            if is_plain and isinstance(prompt, str):
                listed = tokenize_text(tokenizer, prompt)[0]
            else:
                listed = tokenize_prompt(
                    tokenizer, prompt, read_template(config.chat_template), date=config.template_date
                )
        except Refused as refused:
            raise InputError(f"the chat template refuses the prompt: {refused}") from None
        ids = np.array(listed)
        if not len(ids):
            raise InputError("the prompt has no tokens. Write something.")
        if self.context is not None and len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids):,} tokens, but the models read {self.context:,} and one is for the answer. "
                "Shorten it."
            )
        require_ids(ids, self.info.n_ids, tokenizer, self.info.base)
        scored = scored_positions(ids, tokenizer.bos_token_id, drop_bos=config.drop_bos, skip_first=config.skip_first)
        return ids, scored


def _context(models: list[str]) -> int | None:
    """Return how many tokens all of the models read, by their configurations; None where none says so."""
    lengths = [getattr(load_auto(m, "config").get_text_config(), "max_position_embeddings", None) for m in models]
    return min((length for length in lengths if length), default=None)
