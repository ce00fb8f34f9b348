"""Directions of a TopKLoRA, numbered by the rows of directions.parquet: they act in a third model, the adapted base."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Bool
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.models.hooks import core_model
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import final_states, read_out
from crosscoders.text.decoding import token_text
from crosscoders.text.padding import Batch
from diffing.explorer.answers import Change
from diffing.explorer.kinds import Answering, Form, Listing, Pass, fired_on, halves, plain, plain_answer
from diffing.latents.latent_scaling import MODELS
from diffing.topk_lora.command import ADAPTER, DIRECTIONS, read_config
from diffing.topk_lora.readouts import WRITERS
from sae_lora.lora.topk import TopKLoRA

ADAPTED = "adapted"
FORM = Form(
    word="direction", models=(*MODELS, ADAPTED), bars=(ADAPTED,), actions=("steer", "ablate"), tag="fires mostly in",
    unit="its mean activation where it fires", darkest=2.0,
    sorts={
        "write_share": ("share of what is written", -1), "number": ("number", 1),
        "firing_rate": ("tokens it fires on", -1),
        "mean_activation": ("mean activation", -1), "main_label_share": ("share of its main group", -1),
    },
    cells={"write_share": "write share", "firing_rate": "fires on", "mean_activation": "mean act.",
           "main_label_share": "in group"},
)  # fmt: skip
N_LENS = 10


class TopKLoRAKind:
    """The directions of a run folder of `diffing topk-lora fit`.

    Raises:
        InputError: the folder has no adapter of this base, or no directions.
    """

    form = FORM

    def __init__(self, folder: Path, load: Callable[[], ModelPair]) -> None:
        self.data = read_config(folder, "auto").data_config()
        if not (folder / DIRECTIONS).is_file():
            raise InputError(f"{folder} lacks {DIRECTIONS}. Run: diffing topk-lora eval {folder}")
        self.table = pandas.read_parquet(folder / DIRECTIONS)
        self.n = len(self.table)
        self.pair = load()
        self.core = core_model(self.pair.models[0])
        self.adapter = TopKLoRA.load(self.core, folder / ADAPTER)
        self.adapter.detach()  # the base is the base, but inside `_adapted`
        self.rows = {
            str(site): torch.tensor(of.index.to_numpy())[np.argsort(of["direction"].to_numpy())]
            for site, of in self.table.groupby("site")
        }
        """Site -> the row of each of its directions."""
        if {name: len(rows) for name, rows in self.rows.items()} != {n: s.rank for n, s in self.adapter.sites.items()}:
            raise InputError(f"{folder / DIRECTIONS} is of another adapter. Run: diffing topk-lora eval {folder}")

    @contextlib.contextmanager
    def _adapted(self) -> Iterator[None]:
        """Put the adapter on the base."""
        with contextlib.ExitStack() as stack:
            for name, site in self.adapter.sites.items():
                for handle in site.attach(self.core.get_submodule(name), lambda: True):
                    stack.callback(handle.remove)
            yield

    def model(self, name: str) -> Any:
        """Return the model of that name; the adapted base is the base."""
        return self.pair.models[name == "tuned"]

    def on(self, name: str) -> AbstractContextManager[None]:
        """Put the adapter on where the name asks for it."""
        return self._adapted() if name == ADAPTED else contextlib.nullcontext()

    def pass_over(self, batch: Batch) -> Pass:
        """Return the final states of the three models and the directions of every token in the adapted base."""
        activations: dict[str, Tensor] = {}
        finals = []
        observers = {name: _keeper(activations, name, batch) for name in self.adapter.sites}
        for name in FORM.models:
            with self.on(name), self.adapter.observed(observers):
                finals.append(final_states(self.model(name), batch)[0])
        parts: list[tuple[Tensor, ...]] = []
        for name, a in activations.items():
            site = self.adapter.sites[name]
            tokens, directions = a.ne(0).nonzero(as_tuple=True)
            values, norms = a[tokens, directions], site.scale * site.W_out.detach().float().norm(dim=1).cpu()
            written = (values.abs() * norms[directions])[:, None]
            parts.append((tokens, self.rows[name][directions], values, written))
        read = torch.ones(batch.ids.shape[1], dtype=torch.bool)
        return Pass(finals, fired_on(read, *map(torch.cat, zip(*parts, strict=True))))

    def listing(self) -> Listing:
        """Return the directions as the table has them, those that write most first."""
        return Listing(
            list(range(len(self.table))),
            [f"{site.removeprefix('model.')} {j}" for site, j in self.table[["site", "direction"]].to_numpy().tolist()],
            self.table["main_label"].tolist(),
            self.table["mean_activation"].tolist(),
            [halves(context) for context in self.table["context"]],
            [None] * len(self.table),
            {name: self.table[name].tolist() for name in FORM.sorts if name in self.table},
        )

    def page(self, number: int) -> dict[str, Any]:
        """Return the row of a direction, its context, and the tokens that it writes for."""
        row = {name: plain(value) for name, value in self.table.iloc[number].items() if name != "lens"}
        site, lens = self.adapter.sites[row["site"]], dict[str, list[str]]()
        if row["site"].rsplit(".", 1)[-1] in WRITERS:
            lens["base"] = lens_of(self.pair.models[0], self.pair, site.W_out[row["direction"]])
        return {"latent": number, "values": row, "examples": [example_of(row["context"])], "lens": lens}

    def answering(
        self, change: Change, name: str, scored: Bool[np.ndarray, " prompt"], *, is_amplified: bool
    ) -> Answering:
        """Return what writes an answer, with directions changed in the adapted base."""
        if name != ADAPTED:
            if change.latents():
                raise InputError(f"directions are changed in the adapted base. Give model {ADAPTED!r}.")
            return plain_answer(self.pair, name, is_amplified=is_amplified)
        if is_amplified:
            raise InputError("the adapted base has no other model to be amplified against. Give base or tuned.")
        return Answering([self.pair.models[0]], lambda: self._changed(change))

    @contextlib.contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        """Ablated directions are multiplied with 0; to steered ones is added, at every position."""
        multipliers = {site: torch.ones(len(rows), device=self.pair.device) for site, rows in self.rows.items()}
        injections = {site: torch.zeros(len(rows), device=self.pair.device) for site, rows in self.rows.items()}
        for number in change.latents():
            row = self.table.iloc[number]
            if number in change.ablate:
                multipliers[row["site"]][row["direction"]] = 0.0
            injections[row["site"]][row["direction"]] = change.steer.get(number, 0.0) * row["mean_activation"]
        chosen = set(self.table.iloc[change.latents()]["site"])
        with self._adapted(), self.adapter.multiplied({site: multipliers[site] for site in chosen}):
            try:
                for site in chosen:
                    self.adapter.sites[site].injection = injections[site]
                yield
            finally:
                for site in chosen:
                    self.adapter.sites[site].injection = None


def _keeper(activations: dict[str, Tensor], name: str, batch: Batch) -> Any:
    def keep(a: Tensor) -> None:
        if a.shape[:2] == batch.ids.shape:  # an embedding is also asked for ids alone
            activations[name] = a[0].detach().float().cpu()

    return keep


@torch.no_grad()
def lens_of(model: Any, pair: ModelPair, direction: Tensor) -> list[str]:
    """Return the tokens of largest logit when a direction is the residual stream after the last layer."""
    weight, tokenizer = next(model.parameters()), pair.info.tokenizer
    logits = read_out(model, direction[None].to(weight.device, weight.dtype))[0, : len(tokenizer)]
    return [token_text(tokenizer, int(token)) for token in logits.topk(N_LENS).indices]


def example_of(context: str) -> dict[str, Any]:
    """Return a stored context in the form of an example."""
    return {"tokens": halves(context), "values": [0.0, 1.0, 0.0], "peak": 1}
