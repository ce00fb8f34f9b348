"""`diffing sae-gap`: fit and measure every model with one dictionary on the same tokens, then compare.

Reading order: `gap_run` is the command; `roles_of` says which model gets which side; `gap_rows` divides once and
resamples sequences, for all models together; `gap_summary` is the table.

    OUT/<model>/      run folder of `sae-lora fit`; <model>: base, tuned, placebo
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.common.progress import about, say
from crosscoders.common.results import result, row, say_closing
from crosscoders.common.statistics import bootstrap_interval, resample
from crosscoders.models.names import hash_model, load_auto, require_two_models
from diffing.sae_gap.classes import CLASSES, RoleClasses
from diffing.sae_gap.settings import SaeGapSettings
from sae_lora.dictionaries.controls import with_control
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.dictionaries.loading import inspect_dictionary, reads_two_models
from sae_lora.evaluation import cells
from sae_lora.fitting.inputs import Plan, load_dictionaries, load_model, make_plan
from sae_lora.fitting.loop import fit
from sae_lora.fitting.settings import FitConfig
from sae_lora.lora.adapter import choose_layers, load_adapter

CELLS = cells.CELLS[:4]
"""Without the ablations."""


def gap_run(settings: SaeGapSettings) -> dict[str, cells.Measured]:
    """Measure the gaps of every model.

    Raises:
        InputError: a model, the dictionary or the documents are wrong, or do not fit each other; before any fit.
    """
    configs = roles_of(settings)
    plans = {role: _plan(settings, config) for role, config in configs.items()}
    measured = {}
    for role, config in configs.items():
        with about(role):
            folder = fit(config, Path(settings.out) / role, force=settings.force)
        plan, device = plans[role], choose_device(settings.device)
        dictionaries = with_control(load_dictionaries(plan, config, device), config.control, config.seed)
        adapted = load_adapter(load_model(plan, config, device), folder, dictionaries)
        say(f"measure {role} on {plan.rows.n_scored:,} tokens in {len(plan.rows.offsets) - 1:,} sequences")
        with about(role):
            measured[role] = measure_gaps(adapted, dictionaries, plan, batch_rows=settings.batch_rows, device=device)
    return measured


def measure_gaps(
    adapted: Any, dictionaries: Sequence[FrozenDictionary], plan: Plan, *, batch_rows: int, device: torch.device
) -> cells.Measured:
    """Sum over the predictions of every sequence of a plan, of all and of those of each class; `sae-lora eval`, without
    the ablations."""
    n_sequences = len(plan.rows.offsets) - 1
    return cells.measure(
        adapted, dictionaries, lambda: plan.batches(batch_rows, device), n_sequences, plan.keep_ids,
        classes=RoleClasses(plan.rows), cells=CELLS,
    )  # fmt: skip


def roles_of(settings: SaeGapSettings) -> dict[str, FitConfig]:
    """Return the settings of the fit for base, tuned and placebo."""
    models = {"base": settings.base, "tuned": settings.tuned, "placebo": settings.placebo}
    require_two_models(settings.base, settings.tuned)
    if reads_two_models(settings.dictionary):
        if settings.placebo is not None:
            raise InputError(
                f"{settings.dictionary!r} is a crosscoder, which has no side for a placebo. Leave out --placebo."
            )
        other = {"base": settings.tuned, "tuned": settings.base}
        return {
            role: settings.fit_config(str(models[role]), side=role, other_model=other[role])
            for role in ("base", "tuned")
        }
    model_type = load_auto(settings.base, "config").get_text_config().model_type
    info = inspect_dictionary(settings.dictionary, hook_point=settings.hook_point, model_type=model_type)
    trained_on = info.model_hashes
    if trained_on and hash_model(settings.base) not in trained_on:
        raise InputError(
            f"dictionary {settings.dictionary!r} was not trained on the base model {settings.base!r}, so what it "
            "cannot express of the tuned model would say nothing. Give one of the base."
        )
    return {
        role: settings.fit_config(model, foreign_dictionary=bool(trained_on) and hash_model(model) not in trained_on)
        for role, model in models.items()
        if model is not None
    }


def _plan(settings: SaeGapSettings, config: FitConfig) -> Plan:
    """Plan the documents that are measured, after checking those that are fitted on."""
    dictionary = [(settings.dictionary, settings.hook_point)]
    fitted, measured = (
        make_plan(
            text, config.model, dictionary, config.side, foreign=config.foreign_dictionary, other=config.other_model
        )
        for text in (config, settings.eval_config())
    )
    choose_layers(config.layers, fitted.infos, fitted.n_layers)
    return measured


# ---------------------------------------------------------------------------------------------------------------- rows


def gap_rows(measured: Mapping[str, cells.Measured], seed: int = 0) -> list[dict[str, Any]]:
    """Return rows sae-gap.<model>.<class>.<quantity>, and sae-gap.<model>_minus_<other>.<class>.<quantity>, with 95%
    bootstrap intervals over sequences, which all models share.

    Quantities: `ce`, of the model as it is; `ce_gap` and `kl` `.spliced`, `.left` (adapter on) and `.adapted` (adapter
    on, dictionary off: its cost); and the shares `ce_gap.closed` and `kl.closed`.
    """
    n = len(next(iter(measured.values())).n_tokens)
    weights = resample(n, seed)
    entries = [row("sae-gap.sequences", n, "sequences", n)]
    for name in ("all", *CLASSES):
        parts = {role: _sums(of_role, name) for role, of_role in measured.items()}
        n_tokens = next(iter(parts.values())).n_tokens
        n_class, tokens = int(n_tokens.sum()), weights @ n_tokens
        if not (n_class and (tokens > 0).all()):  # no such tokens, or so few that a resample has none
            continue
        of_models = {role: _quantities(part.sums, weights, tokens) for role, part in parts.items()}
        for role in list(of_models)[1:]:
            of_models[f"{role}_minus_base"] = _difference(of_models[role], of_models["base"])
        if "placebo" in measured:
            of_models["tuned_minus_placebo"] = _difference(of_models["tuned"], of_models["placebo"])
        for role, quantities in of_models.items():
            for quantity, values in quantities.items():
                low, high = bootstrap_interval(values) if n > 1 else (None, None)
                unit = "fraction" if quantity.endswith("closed") else "nats/token"
                entries.append(row(f"sae-gap.{role}.{name}.{quantity}", float(values[0]), unit, n_class, low, high))
    return entries


def _sums(measured: cells.Measured, name: str) -> cells.Sums:
    return cells.Sums(measured.sums, measured.n_tokens) if name == "all" else measured.classes[name]


Quantities = dict[str, Float[np.ndarray, " resamples"]]


def _quantities(
    sums: Float[np.ndarray, "cells quantities sequences"],
    weights: Float[np.ndarray, "resamples sequences"],
    tokens: Float[np.ndarray, " resamples"],
) -> Quantities:
    mean = {
        (cell, quantity): weights @ sums[c, q] / tokens
        for c, cell in enumerate(CELLS)
        for q, quantity in enumerate(cells.QUANTITIES)
    }
    quantities = {"ce": mean["plain", "ce"]}
    for cell, name in (("spliced", "spliced"), ("adapted_spliced", "left"), ("adapted", "adapted")):
        quantities[f"ce_gap.{name}"] = mean[cell, "ce"] - mean["plain", "ce"]
        quantities[f"kl.{name}"] = mean[cell, "kl"]
    for quantity in ("ce_gap", "kl"):
        if (quantities[f"{quantity}.spliced"] > 0).all():
            quantities[f"{quantity}.closed"] = 1 - quantities[f"{quantity}.left"] / quantities[f"{quantity}.spliced"]
    return quantities


def _difference(one: Quantities, other: Quantities) -> Quantities:
    return {name: one[name] - other[name] for name in one if name in other and name != "ce"}


def gap_summary(entries: list[dict[str, Any]]) -> str:
    """Write KL and CE gap before and after the fit, a block for each class."""
    values = {entry["name"].removeprefix("sae-gap."): entry for entry in entries}
    lines = []
    for name in ("all", *CLASSES):
        roles = [key.split(".")[0] for key in values if key.endswith(f".{name}.kl.left")]
        if not roles:
            continue
        n = values[f"{roles[0]}.{name}.kl.left"]["n"]
        lines += [
            "",
            f"{name}: {n:,} predictions in {values['sequences']['value']:,} sequences; nats/token, 95% intervals",
            f"  {'':<22}{'KL spliced':>12}   {'KL left':<30}{'closed':>8}{'CE gap':>10}   {'CE gap left'}",
        ]
        lines += [_line(role, {k: values.get(f"{role}.{name}.{k}") for k in _SHOWN}) for role in roles]
    return "\n".join(lines)


_SHOWN = ("kl.spliced", "kl.left", "kl.closed", "ce_gap.spliced", "ce_gap.left")


def _line(role: str, shown: dict[str, Any]) -> str:
    def interval(entry: dict[str, Any]) -> str:
        low, high = entry["low"], entry["high"]
        return f"{entry['value']:.4f}" + (f" ({low:.4f} to {high:.4f})" if low is not None else "")

    closed = "" if shown["kl.closed"] is None or "_minus_" in role else f"{shown['kl.closed']['value']:.1%}"
    return (
        f"  {role.replace('_', ' '):<22}{shown['kl.spliced']['value']:>12.4f}   {interval(shown['kl.left']):<30}"
        f"{closed:>8}{shown['ce_gap.spliced']['value']:>10.4f}   {interval(shown['ce_gap.left'])}"
    )


def sae_gap(settings: SaeGapSettings) -> dict[str, Any]:
    """Run `diffing sae-gap`."""
    started = time.perf_counter()
    entries = gap_rows(gap_run(settings), settings.seed)
    described = result("sae-gap", to_dict(settings), entries)
    files.write_json(Path(settings.out) / "sae-gap.json", described)
    say_closing(started, f"{len(entries)} rows in {Path(settings.out) / 'sae-gap.json'}")
    return {**described, "text": gap_summary(entries)}
