"""`Session`: both models of a run, live.

session = diffing.Session("runs/demo/run")
session.latents("Who are you?")                    which latents fire on each token, and the KL between the models
session.latent(339)                                what is known of a latent
"".join(session.answer("Who are you?", ablate=[339]))
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.formats.load import load_crosscoder
from crosscoders.models import hooks
from crosscoders.models.limits import require_ids
from crosscoders.models.names import load_auto, quiet_transformers
from crosscoders.models.resume import ResumableModel
from crosscoders.text.positions import scored_positions
from crosscoders.text.refusals import Refused
from crosscoders.text.templates import Message
from crosscoders.text.tokens import read_template, tokenize_prompt, tokenize_text
from diffing.causal.lens import logit_lens
from diffing.causal.patching import inspect_cached, load_whole
from diffing.causal.sets import Exchange
from diffing.explorer.answers import Change, Edit, Pieces, changed, steering_vectors
from diffing.explorer.pages import Evidence, latent_page, read_evidence
from diffing.explorer.readings import Texts, TokenReading, read_tokens
from diffing.latents.latent_scaling import MODELS
from diffing.latents.runs import open_run_and_cache
from diffing.latents.table import require_fit, require_latents
from diffing.samples.amplified import decode_steps, stop_ids

Prompt = str | list[Message]
CUT = 0.05
"""Amplified answers take no token below this share of the largest probability, as `diffing say`."""


class Session:
    """Both models of a run, in memory. Several threads may use one; the models serve one of them at a time.

    run: a folder after `diffing scale`. cache: whose models are used; default: the one that the run was trained on.

    Raises:
        InputError: it is no such folder, or the crosscoder, the table, the cache and the models do not belong together.
    """

    def __init__(
        self, run: str | Path, cache: str | Path | None = None, *, device: str = "auto", model_dtype: str = "auto"
    ) -> None:
        self.run, self.cache = open_run_and_cache(str(run), None if cache is None else str(cache))
        self.evidence: Evidence = read_evidence(self.run)
        self.crosscoder = load_crosscoder(self.run, device=str(choose_device(device)))
        require_fit(self.crosscoder, self.cache)
        self.exchange, self.folded = Exchange(self.crosscoder), self.crosscoder.fold()
        self.lengths = torch.column_stack(
            [self.folded.W_dec.detach().norm(dim=2), self.exchange.difference.norm(dim=1)]
        )
        """Per latent the length, at activation 1, of what it writes in the base, in the tuned model, and differently in
        the two; units of x."""
        self.template = read_template(self.cache.config.chat_template)
        self.hook_point: str = self.cache.manifest["hook_point"]
        self.info = inspect_cached(self.cache)
        self.context = _context(self.info.models())
        self.pair = load_whole(self.info, self.hook_point, device, model_dtype)
        self.models = [ResumableModel(model, self.hook_point) for model in self.pair.models]
        self.texts = Texts(self.info.tokenizer, self.info.n_ids)
        self.lock = threading.Lock()
        self._pages: dict[int, dict[str, Any]] = {}

    def latents(self, prompt: Prompt, *, is_plain: bool = False) -> list[TokenReading]:
        """Return what fires on each token of a prompt, and how far the predictions of the models differ there.

        prompt: one user message, in the chat template where there is one; or a chat, a list of messages with `role`
        and `content`. is_plain: text without the template.

        Raises:
            InputError: the prompt is empty, longer than what the models read, or refused by the template.
        """
        ids, scored = self._tokens(prompt, is_plain)
        with self.lock:
            return read_tokens(self.models, self.exchange, self.lengths[:, 2], self.texts, ids, scored)

    def latent(self, latent: int) -> dict[str, Any]:
        """Return what is known of a latent, as plain data: values, verdict and why, examples, histogram of activations,
        lens of both decoders, twins, sets of `diffing causal` that it is in. docs/guide/explore.md lists the fields.

        Raises:
            InputError: there is no such latent.
        """
        require_latents([latent], len(self.evidence.table))
        if latent not in self._pages:
            page = latent_page(self.evidence, self.crosscoder, self.cache, self.info.tokenizer, latent)
            with self.lock, quiet_transformers():
                page["lens"] = logit_lens(self.crosscoder, self.pair, [latent])[str(latent)]
            self._pages[latent] = page
        return self._pages[latent]

    def answer(
        self,
        prompt: Prompt,
        *,
        model: str = "tuned",
        steer: Mapping[int, float] | None = None,
        ablate: Sequence[int] = (),
        exchange: Sequence[int] = (),
        decoder: str = "tuned",
        amplify: float = 0.0,
        max_new_tokens: int = 64,
        is_plain: bool = False,
    ) -> Iterator[str]:
        """Return the pieces of a greedy answer, as they come; the models are free between two of them.

        model: base or tuned, the one that answers. steer: latent -> strength, in units of its largest activation, with
        the decoder of model `decoder`. ablate: latents whose part is taken out. exchange: latents that write with the
        decoder of the other model, so in the tuned model the base's. amplify: how much of the difference of both
        models' log-probabilities is added to the answering model's; 0 is that model alone. prompt, is_plain: as in
        `latents`.

        Raises:
            InputError: as `latents`; a latent, a strength or a name that does not exist; a chat that ends with an
                answer.
        """
        change = Change(dict(steer or {}), tuple(ablate), tuple(exchange), decoder)
        if model not in MODELS:
            raise InputError(f"model is {model!r}; give one of {', '.join(MODELS)}.")
        if not 0 <= amplify <= 100:
            raise InputError(f"amplify is {amplify}; give a number from 0 to 100.")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; give a number from 1.")
        if isinstance(prompt, list) and prompt and prompt[-1].get("role") == "assistant":
            raise InputError("the chat ends with an answer. End it with a message of the user.")
        if change.latents():
            require_latents(change.latents(), len(self.evidence.table))
        ids, scored = self._tokens(prompt, is_plain)
        n_new = max_new_tokens if self.context is None else min(max_new_tokens, self.context - len(ids))
        return self._pieces(ids, scored, MODELS.index(model), change, amplify, n_new)

    def _pieces(
        self,
        ids: Int[np.ndarray, " seq"],
        scored: Bool[np.ndarray, " seq"],
        side: int,
        change: Change,
        amplify: float,
        n_new: int,
    ) -> Iterator[str]:
        both = (self.pair.models[1 - side], self.pair.models[side])
        edit = Edit(self.crosscoder, self.folded, change, side, scored) if change.needs_both() else None
        vectors = steering_vectors(self.folded, change, self.evidence.table["max_activation"].tolist())
        models = both if edit is not None or amplify else both[1:]
        ends = stop_ids(self.info.tokenizer, [hooks.core_model(model) for model in self.pair.models])
        steps = decode_steps(models, [ids.tolist()], strength=amplify, cut=CUT, n_ids=self.info.n_ids)
        pieces = Pieces(self.info.tokenizer)
        for _ in range(n_new):
            with self.lock, quiet_transformers(), changed(both, self.hook_point, edit, vectors):
                (token,) = next(steps).tokens
            if token in ends:
                break
            if piece := pieces.add(token):
                yield piece
        if piece := pieces.rest():
            yield piece

    def _tokens(self, prompt: Prompt, is_plain: bool) -> tuple[Int[np.ndarray, " seq"], Bool[np.ndarray, " seq"]]:
        """Return the ids of a prompt, and which of them the crosscoder reads."""
        if not prompt:
            raise InputError("the prompt is empty. Write something.")
        tokenizer, config = self.info.tokenizer, self.cache.config
        if is_plain and not isinstance(prompt, str):
            raise InputError("a chat has no plain text. Give a text, or leave is_plain out.")
        try:
            if is_plain and isinstance(prompt, str):
                listed = tokenize_text(tokenizer, prompt)[0]
            else:
                listed = tokenize_prompt(tokenizer, prompt, self.template, date=config.template_date)
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
