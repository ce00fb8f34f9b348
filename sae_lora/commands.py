"""What the commands of `sae-lora` do, each as one function of its settings that returns a JSON object."""

import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from crosscoders import memory, store
from crosscoders.commands import closing, result
from crosscoders.config import to_dict
from crosscoders.errors import InputError
from crosscoders.pair import choose_device
from crosscoders.progress import say
from crosscoders.reporting import row
from sae_lora import evaluation
from sae_lora.adapter import load_adapter, read_sidecar
from sae_lora.cli import EvalSettings, FitSettings
from sae_lora.config import FitConfig, pair_up
from sae_lora.fitting import fit
from sae_lora.inputs import load_dictionaries, load_model, make_plan
from sae_lora.memory import MEND, eval_need


def fit_command(settings: FitSettings) -> dict[str, Any]:
    """`sae-lora fit`"""
    started = time.perf_counter()
    config = FitConfig(**{field.name: getattr(settings, field.name) for field in fields(FitConfig)})
    folder = fit(config, settings.out)
    closing(started, f"adapter in {folder}")
    say(f"next: sae-lora eval {shlex.quote(settings.out)} --data HELD_OUT")
    n_tokens = store.read_object(Path(settings.out) / "run.json", "inputs")["inputs"]["tokens"]["n"]
    return result("fit", to_dict(config), [row("fit.tokens", n_tokens, "tokens", n_tokens)])


def eval_command(settings: EvalSettings) -> dict[str, Any]:
    """`sae-lora eval`"""
    started = time.perf_counter()
    if settings.out is not None and Path(settings.out).is_dir():
        raise InputError(f"--out {settings.out!r} is a folder; the results are one JSON file. Name a file in it.")
    sidecar = read_sidecar(settings.run)
    entries = sidecar["dictionaries"]
    paths = settings.dictionary or [entry["path"] for entry in entries]
    side = next((entry["side"] for entry in entries if entry["side"]), None)
    model_name = settings.model or sidecar["model"]["name"]
    chosen = pair_up(paths, [entry["hook_point"] for entry in entries])
    beside = sidecar.get("other_model")
    plan = make_plan(
        settings,
        model_name,
        chosen,
        side,
        fitted_to=sidecar["model"],
        foreign=bool(sidecar.get("foreign_dictionary")),
        other=settings.other_model or (beside["name"] if beside else None),
    )
    device = choose_device(settings.device)
    needed = memory.require([eval_need(settings, plan, device)], MEND)
    dictionaries = load_dictionaries(plan, settings, device)
    adapted = load_adapter(load_model(plan, settings, device), sidecar["folder"], dictionaries)
    n_sequences = len(plan.rows.offsets) - 1
    say(f"eval {sidecar['folder']} on {plan.rows.n_scored:,} tokens in {n_sequences:,} sequences; needs {needed}")
    keep_ids = sidecar["kept_positions"]["token_ids"]
    measured = evaluation.measure(
        adapted, dictionaries, lambda: plan.batches(settings.batch_rows, device), n_sequences, keep_ids
    )
    described = result("eval", to_dict(settings), evaluation.rows(measured, settings.seed))
    if settings.out:
        store.write_json(Path(settings.out), described)
    closing(started, f"{int(measured.n_tokens.sum()):,} predictions")
    return {**described, "text": evaluation.summary(described["rows"])}
