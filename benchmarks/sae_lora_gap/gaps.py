"""Fits around each dictionary, and what they close on held-out documents.

Settings of every fit: SETTINGS, chosen on topk-16 and the development documents, and kept for the others. ARMS and LONG
are the fits that dictionaries get, COMPARED those beside them on one: controls, and correctors cheaper than LoRA.
"""

from pathlib import Path
from typing import Any

from benchmarks.sae_lora_gap.setting import BASE, CONTEXT, CPU, ROWS, batches, text
from crosscoders.common.results import row
from sae_lora import FitConfig
from sae_lora.dictionaries.controls import as_fitted
from sae_lora.evaluation import cells
from sae_lora.fitting.correctors import load_corrector
from sae_lora.fitting.inputs import load_dictionaries, load_model, make_plan
from sae_lora.lora.sidecar import read_sidecar

SETTINGS: dict[str, Any] = {"lr": 5e-3, "lr_decay_fraction": 1.0}
RANKS = {1: 21, 2: 10, 3: 7}
"""Ranks by the number of layers with LoRA, the largest within 5% of the model's parameters."""


def after(rank: int) -> dict[str, Any]:
    """Return settings of LoRA on the layers after the dictionary."""
    return {"layers": "after", "rank": rank, "alpha": 2.0 * rank}


ARMS: dict[str, dict[str, Any]] = {
    "": after(RANKS[2]),
    "all.": {"layers": "all", "rank": 5, "alpha": 10.0},
}
"""Settings of fits, by the prefix of their rows."""
LONG: dict[str, dict[str, Any]] = {"long.": {**ARMS["all."], "epochs": 8}}
"""The same weights with eight times the steps."""
CONTROLS = ("noise", "no-latents", "random-decoder", "shuffled-decoder")
CORRECTORS = {"mean-scale": 2e-3, "affine": 5e-4, "sae": 5e-4}
"""Learning rates, chosen on another SAE of this model (docs/log.md)."""
COMPARED: dict[str, dict[str, Any]] = {f"control_{kind}.": {**ARMS[""], "control": kind} for kind in CONTROLS} | {
    f"corrector_{kind}.": {"corrector": kind, "lr": lr} for kind, lr in CORRECTORS.items()
}
SHOWN = {
    "gap_closed": "gap_closed",
    "kl_closed": "kl_closed",
    "ce_drift": "ce_gap.adapted",
    "ce_gap": "ce_gap.spliced",
    "ce_gap_left": "ce_gap.adapted_spliced",
}
"""Our row -> row of `sae-lora eval`. ce_drift: CE of the adapted model without the dictionary, above plain."""


def fit_config(dictionary: Path, data: str, n_tokens: int, **changes: Any) -> FitConfig:
    """Return the settings of a fit."""
    settings = {"context_length": CONTEXT, "batch_rows": ROWS, "log_every": 1000, "checkpoint_every": 100_000}
    return FitConfig(
        model=BASE, dictionary=str(dictionary), data=data, n_tokens=n_tokens, device="cpu",
        **{**settings, **SETTINGS, **changes},
    )  # fmt: skip


def measured_rows(prefix: str, run: Path, dictionary: Path, data: str, n_tokens: int) -> list[dict[str, Any]]:
    """Return rows of one fit: SHOWN, with 95% intervals over sequences, and its weights as a share of the model's."""
    config = text(data, n_tokens)
    plan = make_plan(config, BASE, [(str(dictionary), None)])
    dictionaries, model = load_dictionaries(plan, config, CPU), load_model(plan, config, CPU)
    n_weights = sum(weight.numel() for weight in model.parameters())
    sidecar = read_sidecar(run)
    dictionaries = as_fitted(dictionaries, sidecar)
    fitted = load_corrector(model, sidecar["folder"], dictionaries)
    n_sequences = len(plan.rows.offsets) - 1
    measured = cells.measure(
        fitted.model, dictionaries, lambda: batches(plan), n_sequences, plan.keep_ids, corrected=fitted.dictionaries
    )
    entries = {entry["name"].removeprefix("eval."): entry for entry in cells.eval_rows(measured)}
    rows = [{**entries[name], "name": f"{prefix}{ours}"} for ours, name in SHOWN.items() if name in entries]
    return [*rows, row(f"{prefix}parameters", fitted.n_weights / n_weights, "of the model's parameters", n_weights)]
