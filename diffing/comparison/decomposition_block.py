"""Pieces of a parameter decomposition: the base with the first n of them added, and the tuned model's other tensors.

Order: what a piece writes times its mean importance on held-out text, over all maps; the control takes alive ones at
random. Every map of the difference is decomposed, as `diffing decompose` does with its defaults.
"""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from crosscoders.common.checks import config_of, to_dict
from crosscoders.common.results import row
from diffing.comparison.direction_block import Task, base_kl, variant_rows
from diffing.comparison.inputs import Inputs
from diffing.decomposition.build import fresh
from diffing.decomposition.curves import by_site, masks_with, ranked, written
from diffing.decomposition.evaluation import explained
from diffing.decomposition.language import LanguageTask, deltas_of, problem_of
from diffing.decomposition.loop import train
from diffing.decomposition.model import Decomposition
from diffing.decomposition.saving import DESCRIPTION, load_, read_description, save
from diffing.decomposition.settings import DecomposeSettings, DecompositionConfig
from diffing.topk_lora.distil import PLACES, contents, read_batches, setting_of

NAME = "decomposition"
Piece = tuple[str, int]


def decomposition_rows(inputs: Inputs, which: str, task: Task, folder: Path) -> list[dict[str, Any]]:
    """Decompose the difference, unless that is done, and return rows directions.decomposition[.random].*"""
    started, reference = time.perf_counter(), base_kl(task)
    decomposition, order, alive = _decomposed(inputs, which, task, folder / NAME)
    trained_seconds = time.perf_counter() - started
    pieces = [n for n in task.settings.pieces if n <= len(alive)]
    generator = torch.Generator().manual_seed(task.seed)
    chosen = {f"{NAME}.top_{n}": order[:n] for n in pieces}
    for n in pieces:
        drawn = torch.randperm(len(alive), generator=generator)[:n].tolist()
        chosen[f"{NAME}.random.top_{n}"] = [alive[i] for i in drawn]
    chosen[f"{NAME}.every"] = order

    def variants() -> Iterator[tuple[str, Any]]:
        for name, of_set in chosen.items():
            with decomposition.masked(masks_with(decomposition, by_site(of_set), on=True)):
                yield name, decomposition.model

    rows = variant_rows(task, reference, variants())
    rows += [row(f"directions.{NAME}.top_{n}.numbers", n, "numbers/token", 1) for n in pieces]
    rows.append(row(f"directions.{NAME}.alive", len(alive), "pieces", len(order)))
    return [*rows, row(f"directions.{NAME}.trained_seconds", trained_seconds, "s", 1)]


def _decomposed(inputs: Inputs, which: str, task: Task, folder: Path) -> tuple[Decomposition, list[Piece], list[Piece]]:
    """Return a decomposition of a copy of the tuned model, all its pieces by what they write, and the alive ones."""
    settings, info = inputs.settings, inputs.infos[which]
    config = DecomposeSettings(
        base=info.base, tuned=info.adapter or info.tuned, data=inputs.train_data(), n_tokens=settings.cached_tokens,
        context_length=settings.context_length, batch_rows=settings.batch_rows, steps=settings.distil_steps,
        seed=task.seed, device=settings.device, out=str(folder),
    )  # fmt: skip
    read = read_batches(config, info)
    setting = setting_of(task.pair, *read)
    deltas, training = deltas_of(*task.pair.models, ["*"]), config_of(DecompositionConfig, config)
    decomposition = fresh(copy.deepcopy(setting.tuned), deltas, training, is_relative=True).to(task.pair.device)
    chosen = {name: value for name, value in to_dict(config).items() if name not in ("out", "device", *PLACES)}
    made_from = {"settings": chosen, **contents(config, *read[:2])}
    if (folder / DESCRIPTION).is_file() and read_description(folder)[1] == made_from:
        load_(decomposition, folder)
    else:
        train(problem_of(setting, decomposition, training.seed), training)
        save(decomposition, folder, training, made_from)
    measured = explained(decomposition, LanguageTask(), setting.held_out)
    order = ranked(written(decomposition, LanguageTask(), setting.held_out, measured.mean))
    numbers = {name: set(of_site) for name, of_site in measured.alive().items()}
    return decomposition, order, [(name, i) for name, i in order if i in numbers[name]]
