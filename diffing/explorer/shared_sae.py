"""Latents of one SAE that both models share: an activation in each model, one direction for both.

With f_j and g_j the activations in the answering model a and in the other one, d_j what latent j writes,

    x_a  -  sum_{j ablated} f_j d_j  +  sum_{j exchanged} (g_j - f_j) d_j     on every token that is scored
         +  sum_{j steered} s_j unit_j d_j                                      at every position
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import ResumableModel
from crosscoders.text.padding import Batch
from diffing.explorer.answers import Change, Edit, changed
from diffing.explorer.kinds import Answering, Form, Listing, Pass, fired_on, plain
from diffing.explorer.pages import N_EXAMPLES, histogram_of, peak_of
from diffing.explorer.topk_lora import lens_of
from diffing.latents.contexts import strongest_examples
from diffing.latents.latent_scaling import MODELS
from diffing.sae.dictionaries import directions, inspect_sae, token_chunk
from diffing.sae.rates import in_both
from sae_lora.dictionaries.frozen import is_transcoder
from sae_lora.dictionaries.loading import read_dictionary

FORM = Form(
    word="latent", models=MODELS, bars=("base", "tuned", "differs"), actions=("steer", "ablate", "exchange"),
    tag="fires mostly in", unit="its mean activation where it fires", darkest=2.0,
    sorts={
        "rank_attribution": ("attribution", 1), "rank_kl": ("KL closed", 1), "rank_change": ("change", 1),
        "number": ("number", 1), "rate_base": ("rate in the base", -1), "rate_tuned": ("rate in the tuned model", -1),
    },
    cells={"change": "change", "attribution": "attribution", "rate_base": "rate, base", "rate_tuned": "rate, tuned"},
)  # fmt: skip
SEEN = 1 << 13
"""Tokens at the start of the cache that a page looks at: all latents are encoded for one."""


class SaeRecord(Record):
    """sae.json, as far as it is read here."""

    version = 1
    again = "run diffing sae again"
    format_version: int
    config: dict[str, Any]
    dictionary: dict[str, Any]
    cache: dict[str, Any]
    examples: dict[str, list[dict[str, Any]]]


class SaeKind:
    """The latents of a folder of `diffing sae`.

    Raises:
        InputError: the SAE is not the one that was read, or is not there.
    """

    form = FORM

    def __init__(self, folder: Path, load: Callable[[], ModelPair]) -> None:
        self.record = files.read_model(folder / "sae.json", SaeRecord)
        settings = self.record["config"]
        info = inspect_sae(settings["sae"], settings["base"], settings["hook_point"], is_patched=False)
        self.dictionary = read_dictionary(info)
        if self.dictionary.identity() != self.record["dictionary"]:
            raise InputError(f"{settings['sae']!r} is not the SAE that {folder} was made with. Run diffing sae again.")
        self.cache = ActivationCache(self.record["cache"]["path"])
        self.data, self.hook_point = self.cache.config.data_config(), info.hook_point
        self.table = pandas.read_parquet(folder / "sae.parquet")
        self.n = len(self.table)
        self.pair = load()
        self.dictionary = self.dictionary.to(self.pair.device)
        self.written = directions(self.dictionary)
        self.norms = self.written.norm(dim=1).cpu()
        self.resumable = [ResumableModel(model, self.hook_point) for model in self.pair.models]
        rates = self.table["rate_base"] + self.table["rate_tuned"]
        self.units = ((self.table["mean_base"] + self.table["mean_tuned"]) / rates.where(rates > 0, 1.0)).tolist()

    def pass_over(self, batch: Batch) -> Pass:
        """Return the final states of both models and the latents that fire in either on the scored tokens."""
        states = [model.run(batch) for model in self.resumable]
        read, places, numbers, values = batch.scored[0].cpu(), [], [], []
        x = [state.activation[batch.scored] for state in states]
        at = read.nonzero()[:, 0].split(token_chunk(self.dictionary))
        for where, *parts in zip(at, *(part.split(token_chunk(self.dictionary)) for part in x), strict=True):
            f = torch.stack([self._encode(part) for part in parts], dim=2)
            token, latent = f.amax(dim=2).gt(0).nonzero(as_tuple=True)
            places.append(where[token])
            numbers.append(latent)
            values.append(f[token, latent])
        both = torch.cat(values) if values else torch.zeros(0, 2)
        latents = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.int64)
        tokens = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        lengths = torch.column_stack([both, (both[:, 1] - both[:, 0]).abs()]) * self.norms[latents, None]
        fired = fired_on(read, tokens, latents, both.amax(dim=1) if len(both) else both[:, 0], lengths)
        return Pass([state.final[0] for state in states], fired)

    def _encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        return self.dictionary.encode(x.to(self.dictionary.dtype)).float().cpu()

    def model(self, name: str) -> Any:
        """Return base or tuned."""
        return self.pair.models[MODELS.index(name)]

    def on(self, name: str) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def listing(self) -> Listing:
        """Return the table, first what attribution puts first, where it was measured."""
        order = next((name for name in FORM.sorts if name in self.table), "rank_change")
        table = self.table.sort_values(order, kind="stable")
        columns = {name: [plain(value) for value in table[name].tolist()] for name in table
                   if name in FORM.sorts or name in FORM.cells}  # fmt: skip
        examples = self.record["examples"]
        return Listing(
            table.index.tolist(),
            [""] * len(table),
            [str(context or "never fires") for context in table["main_context"]],
            [self.units[latent] for latent in table.index],
            [peak_of(examples.get(str(latent), [])) for latent in table.index],
            [None] * len(table),
            columns,
        )

    @torch.no_grad()
    def page(self, number: int) -> dict[str, Any]:
        """Return the row of a latent, where it fires, its histogram in both models, and its lens in both."""
        n_tokens, index = min(SEEN, len(self.cache)), torch.tensor([number])
        values: list[list[Tensor]] = [[], []]
        for tokens in self.cache.batches(4096, 0, n_tokens):
            for part in tokens.activations.split(token_chunk(self.dictionary)):
                for m in range(2):
                    values[m].append(self._encode(part[:, m].to(self.pair.device))[:, number])
        examples = self.record["examples"].get(str(number)) or strongest_examples(
            lambda x: in_both(self.dictionary, x, index), self.cache, [number], self.pair.info.tokenizer,
            n_examples=N_EXAMPLES, n_tokens=n_tokens,
        )[str(number)]  # fmt: skip
        return {
            "latent": number,
            "values": {name: plain(value) for name, value in self.table.loc[number].items()},
            "examples": examples,
            "histograms": {name: histogram_of(torch.cat(values[m]).numpy(), n_tokens) for m, name in enumerate(MODELS)},
            "lens": {
                name: lens_of(model, self.pair, self.written[number])
                for name, model in zip(MODELS, self.pair.models, strict=True)
            },
        }

    def answering(
        self, change: Change, name: str, scored: Bool[np.ndarray, " prompt"], *, is_amplified: bool
    ) -> Answering:
        """Return what writes an answer while latents are changed at the hook point."""
        if change.latents() and is_transcoder(self.dictionary.info):
            raise InputError("latents of a transcoder write elsewhere than they are read, and cannot be changed here.")
        side = MODELS.index(name)
        both = (self.pair.models[1 - side], self.pair.models[side])
        edit = Edit(self._change(change, side), side, scored) if change.needs_both() else None
        vectors = [strength * self.units[j] * self.written[j] for j, strength in change.steer.items()]
        models = list(both if edit is not None or is_amplified else both[1:])
        return Answering(models, lambda: changed(both, self.hook_point, edit, vectors))

    def _change(self, change: Change, side: int) -> Any:
        out, exchanged = list(change.ablate), list(change.exchange)
        written = self.written[out + exchanged].cpu()

        def added(x: Float[Tensor, "tokens 2 d_model"]) -> Float[Tensor, "tokens d_model"]:
            own, other = self._encode(x[:, side]), self._encode(x[:, 1 - side])
            return torch.cat([-own[:, out], other[:, exchanged] - own[:, exchanged]], dim=1) @ written

        return added
