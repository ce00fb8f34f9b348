"""The adapters that are compared on the embedded pair, and how one of them is trained. Finished ones of the same rate
are used again.

WORK/<arm>/seed-<n>/   adapter, rows of its evaluation
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common import files
from crosscoders.common.progress import say
from crosscoders.common.results import ResultRecord, row
from crosscoders.text.settings import DataSource
from diffing.demo import document_file, model_folder
from diffing.topk_lora.command import faithfulness_rows
from diffing.topk_lora.distil import Setting, distil, measure_faithfulness, open_setting
from diffing.topk_lora.readouts import read_directions
from diffing.topk_lora.settings import DistilConfig
from sae_lora.lora.topk import TopKLoRA

PROBE_STEPS = 60
RATES = (2.5e-3, 5e-3, 1e-2)
"""Learning rates that are probed, for each arm on seed 0."""


class Arm(NamedTuple):
    """One kind of adapter."""

    settings: dict[str, Any]
    says: str


def _arm(says: str, embedding: bool = True, **settings: Any) -> Arm:
    return Arm({"embedding": embedding, **settings}, says)


ARMS = {
    "topk-64-8": _arm("TopKLoRA, 8 of 64 directions", rank=64, k=8),
    "dense-8": _arm("dense LoRA of equal active rank", rank=8, k=None, gate="none"),
    "dense-64": _arm("dense LoRA of equal parameters", rank=64, k=None, gate="none"),
    "topk-64-8-no-embedding": _arm("TopKLoRA without the embedding", embedding=False, rank=64, k=8),
    "mlp-448-56": _arm("sparse branch beside each MLP, as many features", rank=448, k=56, modules=["mlp"]),
    "topk-64-4": _arm("TopKLoRA, 4 of 64 directions", rank=64, k=4),
    "dense-4": _arm("dense LoRA of its active rank", rank=4, k=None, gate="none"),
    "relu-64": _arm("ReLU alone, 64 directions", rank=64, k=None, gate="relu"),
    "topk-64-8-hidden": _arm("TopKLoRA, residual stream in the loss", rank=64, k=8, hidden_weight=1.0),
    "topk-64-8-straight-through": _arm("TopKLoRA, straight-through", rank=64, k=8, estimator="straight-through"),
}


def pair_config(steps: int) -> DistilConfig:
    """Return what all arms share: three quarters of the tokens from dialogues, one from raw text."""
    documents: list[list[str | DataSource]] = [
        [DataSource(path=str(document_file(f"{kind}_{split}")), weight=weight, group=group)
         for kind, weight, group in (("dialogues", 0.75, None), ("raw", 0.25, "raw"))]
        for split in ("train", "heldout")
    ]  # fmt: skip
    train, held_out = documents
    return DistilConfig(
        base=str(model_folder("base")), tuned=str(model_folder("tuned")), data=train, eval_data=held_out,
        n_tokens=200_000, holdout_share=0.06, steps=steps, batch_rows=16, rank=64, k=8,
    )  # fmt: skip


def trained(setting: Setting, work: Path, name: str, seed: int, config: DistilConfig) -> tuple[TopKLoRA, list[Any]]:
    """Return the adapter of an arm on the base of `setting`, and the rows of its evaluation; train it if need be."""
    folder = work / name / f"seed-{seed}"
    if (folder / "eval.json").is_file():
        rows = list(files.read_model(folder / "eval.json", ResultRecord)["rows"])
        if any(entry["name"] == "topk-lora.lr" and entry["value"] == config.lr for entry in rows):
            return TopKLoRA.load(setting.base, folder), rows
    say(f"train {name}, seed {seed}, lr {config.lr:g}")
    adapter = distil(setting, replace(config, seed=seed), name=name)
    rows = faithfulness_rows(measure_faithfulness(setting, adapter))
    table = read_directions(setting, adapter)
    rows.append(row("topk-lora.dead", float((table["firing_rate"] == 0).mean()), "fraction of directions", len(table)))
    rows.append(row("topk-lora.lr", config.lr, "peak learning rate", 1))
    adapter.save(folder)
    files.write_json(folder / "eval.json", {"rows": rows})
    return adapter, rows


def arm_config(name: str, base: DistilConfig, lr: float) -> DistilConfig:
    """Return the settings of an arm."""
    return replace(base, lr=lr, **ARMS[name].settings)


def probed_rate(setting: Setting, work: Path, name: str, base: DistilConfig) -> float:
    """Return the rate of `RATES` with the smaller KL on the last training batches' documents after a short run."""
    path = work / name / "rates.json"
    if path.is_file():
        return float(files.read_model(path, ResultRecord)["rows"][0]["value"])
    kls, probed = {}, setting._replace(held_out=setting.train[-20:], rows=setting.train_rows)
    for lr in RATES:
        adapter = distil(setting, replace(arm_config(name, base, lr), steps=PROBE_STEPS), name=f"{name} probe {lr:g}")
        measured = measure_faithfulness(probed, adapter)
        kls[lr] = float(measured.kl[0].sum() / measured.n_tokens.sum())
        adapter.detach()
    best = min(kls, key=lambda lr: kls[lr])
    entries = [row("lr", best, "peak learning rate", 1), *(row(f"kl.{lr:g}", kls[lr], "nats/token", 1) for lr in RATES)]
    files.write_json(path, {"rows": entries})
    return best


def opened(steps: int) -> tuple[Setting, DistilConfig]:
    """Return both models with their batches, and the shared settings."""
    config = pair_config(steps)
    return open_setting(config), config
