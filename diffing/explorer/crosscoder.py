"""Latents of a crosscoder: one activation for both models, a decoder for each."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from crosscoders.activations.cache import ActivationCache
from crosscoders.formats.load import load_crosscoder
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import ResumableModel
from crosscoders.text.padding import Batch
from diffing.causal.lens import logit_lens
from diffing.causal.sets import Exchange
from diffing.explorer.answers import Change, Edit, changed, steering_vectors, written_by
from diffing.explorer.kinds import Answering, Form, Listing, Pass, fired_on
from diffing.explorer.pages import latent_page, peak_of, read_evidence
from diffing.latents.latent_scaling import MODELS
from diffing.latents.table import require_fit

FORM = Form(
    word="latent", models=MODELS, bars=("base", "tuned", "differs"), actions=("steer", "ablate", "exchange"),
    tag="verdict", unit="its largest activation of the table", darkest=1.0,
    sorts={
        "rank": ("rank", 1), "number": ("number", 1), "relative_decoder_norm": ("relative norm", -1),
        "decoder_cosine": ("decoder cosine", 1), "nu_error": ("nu_error", 1),
        "nu_reconstruction": ("nu_reconstruction", 1), "n_active": ("tokens it fires on", -1),
        "max_activation": ("largest activation", -1),
    },
    cells={"relative_decoder_norm": "rel. norm", "decoder_cosine": "cosine", "nu_error": "nu_error",
           "n_active": "tokens"},
)  # fmt: skip


class CrosscoderKind:
    """The latents of a run after `diffing scale`.

    Raises:
        InputError: run, cache and models do not belong together.
    """

    form = FORM

    def __init__(self, run: Path, cache: ActivationCache, load: Callable[[], ModelPair]) -> None:
        self.evidence, crosscoder, self.cache = read_evidence(run), load_crosscoder(run), cache
        require_fit(crosscoder, cache)
        self.n = len(self.evidence.table)
        self.data = cache.config.data_config()
        self.pair = load()
        self.crosscoder = crosscoder = crosscoder.to(self.pair.device)
        self.hook_point: str = cache.manifest["hook_point"]
        self.exchange, self.folded = Exchange(crosscoder), crosscoder.fold()
        self.lengths = torch.column_stack(
            [self.folded.W_dec.detach().norm(dim=2), self.exchange.difference.norm(dim=1)]
        )
        """Per latent the length, at activation 1, of what it writes in the base, in the tuned model, and differently in
        the two; units of x."""
        self.resumable = [ResumableModel(model, self.hook_point) for model in self.pair.models]

    def pass_over(self, batch: Batch) -> Pass:
        """Return the final states of both models and the latents of the scored tokens."""
        states = [model.run(batch) for model in self.resumable]
        x = torch.stack([state.activation[batch.scored] for state in states], dim=1)
        read = batch.scored[0].cpu()
        columns: list[list[torch.Tensor]] = [[torch.zeros(0, dtype=torch.int64)] for _ in range(2)]
        values, done = [torch.zeros(0)], 0
        for entries in self.exchange.take_apart(x, torch.zeros(len(x), dtype=torch.bool)).entries if len(x) else ():
            columns[0].append(entries.tokens.cpu() + done)
            columns[1].append(entries.latents.cpu())
            values.append(entries.values.cpu())
            done += entries.n_tokens
        (tokens, latents), activations = map(torch.cat, columns), torch.cat(values)
        lengths = self.lengths.cpu()[latents] * activations[:, None]
        fired = fired_on(read, read.nonzero()[:, 0][tokens], latents, activations, lengths)
        return Pass([state.final[0] for state in states], fired)

    def model(self, name: str) -> Any:
        """Return base or tuned."""
        return self.pair.models[MODELS.index(name)]

    def on(self, name: str) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def listing(self) -> Listing:
        """Return the table, best rank first, with names and the text around each peak."""
        run, interpreted = self.evidence.run, self.evidence.interpreted
        columns = {name: [column[i] for i in run.latents.order] for name, column in run.latents.columns.items()}
        numbers = columns["latent"]
        values = {name: columns[name] for name in ("rank", *FORM.sorts) if name in columns} | {
            "main_context": columns["main_context"]
        }
        return Listing(
            numbers,
            [""] * len(numbers),
            columns["verdict"],
            columns["max_activation"],
            [peak_of([e._asdict() for e in run.examples.get(latent, [])[:1]]) for latent in numbers],
            [interpreted.get(str(latent), {}).get("name") for latent in numbers],
            values,
        )

    def page(self, number: int) -> dict[str, Any]:
        """Return what the run knows of a latent, and the lens of both decoders."""
        page = latent_page(self.evidence, self.crosscoder, self.cache, self.pair.info.tokenizer, number)
        return page | {"lens": logit_lens(self.crosscoder, self.pair, [number])[str(number)]}

    def answering(
        self, change: Change, name: str, scored: Bool[np.ndarray, " prompt"], *, is_amplified: bool
    ) -> Answering:
        """Return what writes an answer while latents of the answering model are changed at the hook point."""
        side = MODELS.index(name)
        both = (self.pair.models[1 - side], self.pair.models[side])
        edit = None
        if change.needs_both():
            edit = Edit(written_by(self.crosscoder, self.folded, change, side), side, scored)
        vectors = steering_vectors(self.folded, change, self.evidence.table["max_activation"].tolist())
        models = list(both if edit is not None or is_amplified else both[1:])
        return Answering(models, lambda: changed(both, self.hook_point, edit, vectors))
