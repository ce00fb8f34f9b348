"""Speed of the same fit by three routes, in turn: the whole model each time, the common lower layers once, and with
what the frozen model computes stored. Every route trains an adapter of its own from the same start on the same batches;
their losses have to be equal bit for bit."""

from pathlib import Path
from typing import Any

from benchmarks.sae_lora_gap.gaps import ARMS, fit_config
from benchmarks.sae_lora_gap.setting import CPU, Size
from benchmarks.timing import interleaved, median_row, ratio_row
from sae_lora.fitting import objective
from sae_lora.fitting.correctors import start
from sae_lora.fitting.inputs import load_dictionaries, load_model, make_plan
from sae_lora.fitting.loop import common_prefix, make_optimizer, take_step
from sae_lora.lora.adapter import choose_layers

ROUTES = ("whole", "prefix", "stored")
N_BATCHES = 8
BATCHES: dict[str, dict[str, Any]] = {"": {}, "packed.": {"pack": True, "context_length": 1024, "batch_rows": 1}}
"""Settings by the prefix of their rows: batches of 16 texts, as all fits of this benchmark have them, and the published
ones, of one packed sequence of 1,024 tokens."""


def run(size: Size, data: str, folder: Path) -> list[dict[str, Any]]:
    """Return rows prefix_speedup, stored_speedup (median of the ratios by round, quartiles) and tokens per second, for
    each of BATCHES."""
    return [entry for prefix, changes in BATCHES.items() for entry in _of_batches(size, data, folder, prefix, changes)]


def _of_batches(size: Size, data: str, folder: Path, name: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    config = fit_config(folder, data, size.tokens, **ARMS[""], **changes)
    plan = make_plan(config, config.model, [(str(folder), None)])
    dictionaries = load_dictionaries(plan, config, CPU)
    layers = choose_layers(config.layers, plan.infos, plan.n_layers)
    chosen = [batch for _, batch in zip(range(N_BATCHES), plan.batches(config.batch_rows, CPU), strict=False)]
    losses: dict[str, list[float]] = {route: [] for route in ROUTES}

    def route_of(route: str) -> Any:
        fitted = start(config, load_model(plan, config, CPU), dictionaries, layers)
        optimizer = make_optimizer(fitted, config)
        prefix = common_prefix(fitted, layers, plan, config, CPU) if route != "whole" else None
        stored: list[objective.States | None] = [None] * len(chosen)
        if route == "stored":
            stored = [objective.states(fitted.model, dictionaries[0], batch, plan.keep_ids) for batch in chosen]

        def steps() -> None:
            for batch, known in zip(chosen, stored, strict=True):
                kl, _ = take_step(fitted, batch, plan.keep_ids, config, optimizer, prefix, known, 0, Path("memory"))
                losses[route].append(kl)

        return steps

    seconds = interleaved({route: route_of(route) for route in ROUTES}, n_rounds=size.rounds)
    assert losses["whole"] == losses["prefix"] == losses["stored"]
    n_tokens = sum(int(batch.attention_mask.sum()) for batch in chosen)
    note = f"{N_BATCHES} batches of {config.batch_rows} sequences a round, CPU time of one thread, equal losses"
    rows = [
        ratio_row(f"sae-lora.{name}{route}_speedup", seconds["whole"], seconds[route], "ratio of seconds", note)
        for route in ROUTES[1:]
    ]
    rows += [
        median_row(
            f"sae-lora.{name}speed.{route}.tokens_per_second", [n_tokens / s for s in seconds[route]], "tokens/s", note
        )
        for route in ROUTES
    ]
    return rows
