"""What the commands of `sae-lora` do, each as one function of its settings that returns a JSON object."""

import time
from pathlib import Path
from typing import Any

import torch

from crosscoders.common import files, memory
from crosscoders.common.checks import to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.common.progress import say, watched
from crosscoders.common.results import result, row, say_closing
from sae_lora.dictionaries.controls import as_fitted
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.dictionaries.settings import WITHOUT_LATENTS, ControlKind
from sae_lora.evaluation import ablation, cells, tables
from sae_lora.evaluation.classes import TokenClasses
from sae_lora.evaluation.settings import CompareSettings, EvalSettings
from sae_lora.fitting.correctors import Fitted, load_corrector
from sae_lora.fitting.inputs import Plan, load_dictionaries, load_model, make_plan
from sae_lora.fitting.needs import MEND, eval_need
from sae_lora.fitting.settings import TextConfig, pair_up
from sae_lora.lora.sidecar import read_sidecar


def eval_command(settings: EvalSettings) -> dict[str, Any]:
    """Run `sae-lora eval`."""
    started = time.perf_counter()
    _require_file(settings.out)
    sidecar = read_sidecar(settings.run)
    control = _control(sidecar)
    if settings.stability and control in WITHOUT_LATENTS:
        raise InputError(f"stability ablates latents, of which control {control!r} has none. Leave it out.")
    plan = _plan(settings, sidecar)
    device = choose_device(settings.device)
    fitted, dictionaries = _load(settings, plan, sidecar, device)
    measured = _measure(settings, plan, sidecar, fitted, dictionaries, device)
    rows = cells.eval_rows(measured, settings.seed)
    rows.append(row("eval.weights", fitted.n_weights, "weights", fitted.n_weights))
    for dictionary in dictionaries:
        point = dictionary.hook_point
        before, after = (measured.n_active[f"{point}.{when}"] for when in ("before", "after"))
        rows += ablation.rate_rows(point, before, after, settings.seed)
        chosen = ablation.choose_latents(before, settings.stability, settings.seed)
        if chosen:
            say(f"ablating {len(chosen)} latents at {point}")
            effects = ablation.effects(
                fitted, dictionaries, point, chosen,
                watched(
                    plan.batches(settings.batch_rows, device), f"ablate at {point}", total=len(plan.rows.offsets) - 1,
                    unit="seq", size=lambda batch: len(batch.ids),
                ),
                sidecar["kept_positions"]["token_ids"], settings.seed,
            )  # fmt: skip
            rows += ablation.effect_rows(point, effects, settings.seed)
    described = _publish(result("eval", to_dict(settings), rows), settings.out)
    say_closing(started, f"{int(measured.n_tokens.sum()):,} predictions")
    return {**described, "text": tables.eval_summary(rows)}


def compare_command(settings: CompareSettings) -> dict[str, Any]:
    """Run `sae-lora compare`."""
    started = time.perf_counter()
    _require_file(settings.out)
    sidecars = {Path(run).name: read_sidecar(run) for run in settings.runs}
    if len(sidecars) < len(settings.runs) or not sidecars:
        raise InputError(f"runs {settings.runs} need different folder names, which head the lines. Give one or more.")
    _require_comparable(sidecars)
    plan = _plan(settings, next(iter(sidecars.values())))
    device = choose_device(settings.device)
    measured, weights = {}, {}
    for name, sidecar in sidecars.items():
        fitted, dictionaries = _load(settings, plan, sidecar, device)
        measured[name] = _measure(settings, plan, sidecar, fitted, dictionaries, device)
        weights[name] = fitted.n_weights
    rows = tables.comparison_rows(measured, weights, settings.seed)
    described = _publish(result("compare", to_dict(settings), rows), settings.out)
    say_closing(started, f"{len(sidecars)} runs")
    return {**described, "text": tables.comparison_table(rows, {name: _what(s) for name, s in sidecars.items()})}


def _require_file(out: str | None) -> None:
    if out is not None and Path(out).is_dir():
        raise InputError(f"--out {out!r} is a folder; the results are one JSON file. Name a file in it.")


def _publish(described: dict[str, Any], out: str | None) -> dict[str, Any]:
    if out is not None:
        files.write_json(Path(out), described)
    return described


def _control(sidecar: dict[str, Any]) -> ControlKind:
    control = sidecar["dictionaries"][0]["control"]
    kind: ControlKind = control["kind"] if control else "none"
    return kind


def _what(sidecar: dict[str, Any]) -> str:
    """Return corrector and control of a run in words."""
    lora = f" {sidecar['rank']} on {len(sidecar['layers'])} layers" if sidecar["corrector"] == "lora" else ""
    control = _control(sidecar)
    return sidecar["corrector"] + lora + ("" if control == "none" else f", {control}")


def _require_comparable(sidecars: dict[str, dict[str, Any]]) -> None:
    """Raise InputError unless the runs share model, tokens, kept positions and, controls aside, dictionaries."""

    def shared(sidecar: dict[str, Any]) -> dict[str, Any]:
        sources = [
            (entry["hook_point"], entry["control"]["source_hash"] if entry["control"] else entry["hash"])
            for entry in sidecar["dictionaries"]
        ]
        return {
            "model": sidecar["model"]["hash"], "training tokens": sidecar["tokens"]["hash"], "dictionary": sources,
            "kept positions": sidecar["kept_positions"],
        }  # fmt: skip

    (first, wanted), *others = ((name, shared(sidecar)) for name, sidecar in sidecars.items())
    for name, other in others:
        for key, value in other.items():
            if value != wanted[key]:
                raise InputError(
                    f"runs {first!r} and {name!r} differ in {key}, so their figures are not comparable. Compare fits "
                    "that share model, training tokens and dictionary."
                )


def _plan(settings: EvalSettings | CompareSettings, sidecar: dict[str, Any]) -> Plan:
    entries = sidecar["dictionaries"]
    paths = settings.dictionary or [entry["path"] for entry in entries]
    side = next((entry["side"] for entry in entries if entry["side"]), None)
    model_name = settings.model or sidecar["model"]["name"]
    chosen = pair_up(paths, [entry["hook_point"] for entry in entries])
    beside = sidecar.get("other_model")
    return make_plan(
        settings, model_name, chosen, side, fitted_to=sidecar["model"], foreign=sidecar["foreign_dictionary"],
        other=settings.other_model or (beside["name"] if beside else None),
    )  # fmt: skip


def _load(
    settings: EvalSettings | CompareSettings, plan: Plan, sidecar: dict[str, Any], device: torch.device
) -> tuple[Fitted, list[FrozenDictionary]]:
    """Return the fit on its model, and the dictionaries or controls that it started from."""
    memory.require([eval_need(settings, plan, device)], MEND, force=settings.force)
    dictionaries = as_fitted(load_dictionaries(plan, settings, device), sidecar)
    return load_corrector(load_model(plan, settings, device), sidecar["folder"], dictionaries), dictionaries


def _measure(
    settings: TextConfig,
    plan: Plan,
    sidecar: dict[str, Any],
    fitted: Fitted,
    dictionaries: list[FrozenDictionary],
    device: torch.device,
) -> cells.Measured:
    n_sequences = len(plan.rows.offsets) - 1
    say(f"eval {sidecar['folder']} on {plan.rows.n_scored:,} tokens in {n_sequences:,} sequences")
    keep_ids = sidecar["kept_positions"]["token_ids"]
    return cells.measure(
        fitted.model, dictionaries, lambda: plan.batches(settings.batch_rows, device), n_sequences, keep_ids,
        corrected=fitted.dictionaries, classes=TokenClasses(plan.rows), label=f"eval {Path(sidecar['folder']).name}",
    )  # fmt: skip
