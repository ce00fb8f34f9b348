"""TopKLoRA as pieces: the tuned model distilled into the base, with the first n directions on and the others off.

Order: the share of what each direction writes on held-out text, largest first; the control takes alive ones at random.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.records import Record
from crosscoders.common.results import row
from diffing.comparison.direction_block import Task, base_kl, variant_rows
from diffing.comparison.inputs import Inputs
from diffing.topk_lora.distil import PLACES, contents, distil, read_batches, setting_of
from diffing.topk_lora.readouts import read_directions
from diffing.topk_lora.sets import Directions
from diffing.topk_lora.settings import DistilConfig
from sae_lora.lora.topk import TopKLoRA


class Trained(Record):
    """made.json of an adapter."""

    made_from: dict[str, Any]
    """Settings, and hashes of models and tokens."""
    order: list[int]
    """Directions by what they write, `Directions` numbers."""
    firing_rate: list[float]
    """Of those."""


def topk_rows(inputs: Inputs, which: str, task: Task, folder: Path) -> list[dict[str, Any]]:
    """Distil a TopKLoRA, unless that is done, and return rows directions.topk-lora[.random].*"""
    started, reference = time.perf_counter(), base_kl(task)
    adapter, order, rates = _trained(inputs, which, task, folder / "topk-lora")
    trained_seconds = time.perf_counter() - started
    directions, alive = Directions(adapter), order[rates > 0]
    pieces = [n for n in task.settings.pieces if n <= len(alive)]
    generator = np.random.default_rng(task.seed)
    kept = {f"topk-lora.top_{n}": order[:n] for n in pieces}
    kept |= {f"topk-lora.random.top_{n}": generator.choice(alive, n, replace=False) for n in pieces}
    kept["topk-lora.every"] = order

    def variants() -> Iterator[tuple[str, Any]]:
        for name, chosen in kept.items():
            m = torch.zeros(directions.n, device=directions.device)
            m[torch.from_numpy(chosen)] = 1
            with directions.multiplied(m):
                yield name, task.pair.models[0]

    try:
        rows = variant_rows(task, reference, variants())
    finally:
        adapter.detach()
    rows += [row(f"directions.topk-lora.top_{n}.numbers", float(rates[:n].sum()), "numbers/token", 1) for n in pieces]
    rows.append(row("directions.topk-lora.alive", len(alive), "directions", directions.n))
    return [*rows, row("directions.topk-lora.trained_seconds", trained_seconds, "s", 1)]


def _trained(
    inputs: Inputs, which: str, task: Task, folder: Path
) -> tuple[TopKLoRA, Int[np.ndarray, " directions"], Float[np.ndarray, " directions"]]:
    """Return an adapter on the base, its directions by what they write, and their firing rates."""
    settings, info = inputs.settings, inputs.infos[which]
    config = DistilConfig(
        base=info.base, tuned=info.adapter or info.tuned, data=inputs.train_data(), n_tokens=settings.cached_tokens,
        context_length=min(settings.context_length, DistilConfig.context_length), chat_template=settings.chat_template,
        template_date=settings.template_date, batch_rows=settings.batch_rows, steps=settings.distil_steps,
        embedding=True, seed=task.seed, device=settings.device,
    )  # fmt: skip
    read = read_batches(config, info)
    chosen = {name: value for name, value in to_dict(config).items() if name not in ("device", *PLACES)}
    made_from = {"settings": chosen, **contents(config, *read[:2])}
    if (folder / "made.json").is_file():
        recorded = files.read_model(folder / "made.json", Trained)
        if recorded["made_from"] == made_from:
            adapter = TopKLoRA.load(task.pair.models[0], folder)
            return adapter, np.array(recorded["order"]), np.array(recorded["firing_rate"])
    setting = setting_of(task.pair, *read)
    adapter = distil(setting, config)
    table = read_directions(setting, adapter)
    numbers = {name: i for i, name in enumerate(Directions(adapter).names())}
    order = [numbers[site, int(j)] for site, j in zip(table["site"], table["direction"], strict=True)]
    rates = table["firing_rate"].tolist()
    adapter.save(folder)
    files.write_json(folder / "made.json", {"made_from": made_from, "order": order, "firing_rate": rates})
    return adapter, np.array(order), np.array(rates)
