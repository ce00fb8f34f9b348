"""Pieces of a decomposed fine-tune, numbered by the rows of pieces.parquet: their causal importance on each token."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Bool
from torch import Tensor

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import final_states
from crosscoders.text.padding import Batch
from crosscoders.text.settings import DataConfig
from crosscoders.training.checkpoint import RunRecord
from diffing.decomposition.build import fresh
from diffing.decomposition.curves import masks_with
from diffing.decomposition.language import deltas_of
from diffing.decomposition.loop import ON
from diffing.decomposition.saving import DESCRIPTION, DecompositionRecord, load_, read_description
from diffing.explorer.answers import Change
from diffing.explorer.kinds import Answering, Form, Listing, Pass, fired_on, halves, plain, plain_answer
from diffing.explorer.topk_lora import example_of, lens_of
from diffing.latents.latent_scaling import MODELS
from diffing.topk_lora.readouts import WRITERS

PIECES = "pieces.parquet"
FORM = Form(
    word="piece", models=MODELS, bars=("tuned",), actions=("ablate",), tag="important mostly in", unit="importance 1",
    darkest=1.0,
    sorts={
        "written": ("what it writes", -1), "number": ("number", 1), "mean_importance": ("mean importance", -1),
        "rate": ("tokens it is on", -1), "energy": ("share of the change", -1), "cluster": ("cluster", 1),
    },
    cells={"written": "written", "mean_importance": "importance", "rate": "on", "cluster": "cluster"},
)  # fmt: skip


class EvalRecord(Record):
    """eval.json, as far as it is read here."""

    again = "run diffing decompose again"
    pieces: list[dict[str, Any]]


class DecompositionKind:
    """The alive pieces of a run folder of `diffing decompose`.

    Raises:
        InputError: the folder has none, or they are of other sites than the models have.
    """

    form = FORM

    def __init__(self, folder: Path, load: Callable[[], ModelPair]) -> None:
        config, _ = read_description(folder)
        settings = files.read_model(folder / "run.json", RunRecord)["config"]
        template = {name: settings[name] for name in ("chat_template", "template_date") if name in settings}
        self.data = DataConfig(data="", n_tokens=1, **template)
        if not (folder / PIECES).is_file():
            raise InputError(f"{folder} lacks {PIECES}. Run the same diffing decompose again; it is not trained anew.")
        self.table = pandas.read_parquet(folder / PIECES)
        self.n = len(self.table)
        self.effects = {
            (entry["site"], entry["piece"]): entry
            for entry in files.read_model(folder / "eval.json", EvalRecord)["pieces"]
        }
        sites = files.read_model(folder / DESCRIPTION, DecompositionRecord)["sites"]
        self.pair = load()
        base, tuned = self.pair.models
        self.decomposition = fresh(tuned, deltas_of(base, tuned, sites), config, is_relative=True)
        load_(self.decomposition, folder)
        self.decomposition.to(self.pair.device)
        self.rows = {str(site): of for site, of in self.table.groupby("site")}

    def model(self, name: str) -> Any:
        """Return base or tuned."""
        return self.pair.models[MODELS.index(name)]

    def on(self, name: str) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def pass_over(self, batch: Batch) -> Pass:
        """Return the final states of both models and the pieces that the tuned one needs on each token."""
        base = final_states(self.pair.models[0], batch)[0]
        with self.decomposition.reading() as inputs:
            tuned = final_states(self.pair.models[1], batch)[0]
        importances = self.decomposition.importances(inputs)
        parts: list[tuple[Tensor, ...]] = []
        for name, rows in self.rows.items():
            site, pieces = self.decomposition.sites[name], rows["piece"].to_list()
            g = importances[name].lower[0][:, pieces].float().cpu()
            a = site.activations(inputs[name])[0][:, pieces].float().cpu().abs()
            lengths = g * a * site.pieces()[1][pieces].norm(dim=1).cpu()
            tokens, columns = g.gt(ON).nonzero(as_tuple=True)
            numbers = torch.tensor(rows.index.to_list())[columns]
            parts.append((tokens, numbers, g[tokens, columns], lengths[tokens, columns][:, None]))
        read = torch.ones(batch.ids.shape[1], dtype=torch.bool)
        return Pass([base, tuned], fired_on(read, *map(torch.cat, zip(*parts, strict=True))) if parts else [])

    def listing(self) -> Listing:
        """Return the pieces as the table has them, those that write most first."""
        pieces = self.table[["site", "piece"]].to_numpy().tolist()
        return Listing(
            list(range(len(self.table))),
            [f"{site.removeprefix('model.')} {piece}" for site, piece in pieces],
            self.table["main_label"].tolist(),
            [1.0] * len(self.table),
            [halves(context) for context in self.table["context"]],
            [None] * len(self.table),
            {name: self.table[name].tolist() for name in FORM.sorts if name in self.table},
        )

    def page(self, number: int) -> dict[str, Any]:
        """Return the row of a piece, what switching it off does, its context, and the tokens that it writes for."""
        row = {str(name): plain(value) for name, value in self.table.iloc[number].items()}
        lens: dict[str, list[str]] = {}
        if row["site"].rsplit(".", 1)[-1] in WRITERS:
            written = self.decomposition.sites[row["site"]].pieces()[1][row["piece"]]
            lens["tuned"] = lens_of(self.pair.models[1], self.pair, written)
        effects = self.effects.get((row["site"], row["piece"]), {})
        lens |= {name: effects[name] for name in ("raised", "lowered") if effects.get(name)}
        measured = {name: effects[name] for name in ("kl_needed", "kl_idle", "n_needed") if name in effects}
        return {
            "latent": number, "values": row | measured, "examples": [example_of(row["context"])], "lens": lens,
        }  # fmt: skip

    def answering(
        self, change: Change, name: str, scored: Bool[np.ndarray, " prompt"], *, is_amplified: bool
    ) -> Answering:
        """Return what writes an answer, with pieces of the tuned model switched off at every position."""
        answering = plain_answer(self.pair, name, is_amplified=is_amplified)
        if not change.latents():
            return answering
        if name != "tuned":
            raise InputError("pieces are of the tuned model. Give model 'tuned'.")
        chosen: dict[str, list[int]] = {}
        for site, piece in self.table.iloc[list(change.ablate)][["site", "piece"]].to_numpy().tolist():
            chosen.setdefault(site, []).append(piece)
        masks = masks_with(self.decomposition, chosen, on=False)
        return Answering(answering.models, lambda: self.decomposition.masked(masks))
