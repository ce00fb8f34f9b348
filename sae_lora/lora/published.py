"""TopKLoRA adapters in the layout that is published: PEFT's files, `topk_config.json` beside them, `circuits/*.json`.

`read_published` puts one on a model; `write_published` writes ours so, with a warning, since plain PEFT takes such a
folder for a dense LoRA and says nothing; `read_circuits` reads certified sets of latents.

Layout: interpretable-finetuning/TopKLoRA on GitHub and its adapters on the hub (interpretable-finetuning/topklora).
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from sae_lora.lora.layer import SparseLoRATable
from sae_lora.lora.settings import Gate, TopKLoRAConfig
from sae_lora.lora.topk import TopKLoRA

TOPK_CONFIG, PEFT_CONFIG, WEIGHTS = "topk_config.json", "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class TopKConfigRecord(Record):
    """topk_config.json; keys that are not named have defaults."""

    again = "download it again"
    r: int = Field(ge=1)
    alpha: float
    k: int = Field(ge=1)
    k_final: int | None = None
    use_topk: bool = True
    dense_baseline: bool = False
    relu_latents: bool = True
    alpha_over_r: bool = True
    topk_mode: str = "topk"


def read_published(model: nn.Module, folder: str | Path) -> TopKLoRA:
    """Put a published adapter on the model that it was trained on.

    Raises:
        InputError: no such layout, another model, or settings whose meaning is not certain: `alpha_over_r` false with
            k other than k_final (training scaled by the first k, the authors' analysis by the last), latents without
            ReLU, a shared mask of a sequence.
        CorruptData: weights are missing or have other shapes.
    """
    path = Path(folder)
    if not (path / TOPK_CONFIG).is_file():
        raise InputError(f"{path} holds no {TOPK_CONFIG}, so it is no published TopKLoRA. Plain LoRA loads with PEFT.")
    saved = {**TopKConfigRecord.model_construct(r=1, alpha=1, k=1).model_dump(),
             **files.read_model(path / TOPK_CONFIG, TopKConfigRecord)}  # fmt: skip
    gate, k, scale = _meaning(saved, path)
    weights = {key.removeprefix(PREFIX): value for key, value in files.read_tensors(path / WEIGHTS).items()}
    names = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
    unknown = [key for key in weights if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if unknown or not names:
        raise InputError(f"{path / WEIGHTS} holds {unknown[0] if unknown else 'nothing'!r}, which is no LoRA of ours.")
    layers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    config = TopKLoRAConfig(
        rank=saved["r"], k=k, gate=gate, alpha=scale * saved["r"], layers=layers,
        modules=sorted({name.rsplit(".", 1)[-1] for name in names}), k_start_factor=1.0,
    )  # fmt: skip
    adapter = TopKLoRA.attach(model, config)
    try:
        if set(adapter.sites) != set(names):
            other = sorted(set(adapter.sites) ^ set(names))[0]
            raise InputError(f"the adapter in {path} is for another model: {other!r} is on one side only.")
        for name, site in adapter.sites.items():
            a, b = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            if a.shape != site.A.shape or b.T.shape != site.W_out.shape:
                raise CorruptData(f"{path / WEIGHTS} has other shapes for {name!r} than the model. Check the model.")
            with torch.no_grad():
                site.A.copy_(a)
                site.W_out.copy_(b.T)
    except Exception:
        adapter.detach()
        raise
    return adapter


def _meaning(saved: dict[str, Any], path: Path) -> tuple[Gate, int | None, float]:
    """Return gate, k and scale at inference."""
    k = saved["k_final"] if saved["k_final"] is not None else saved["k"]
    if not saved["alpha_over_r"] and k != saved["k"]:
        raise InputError(
            f"{path / TOPK_CONFIG} has alpha_over_r false with k {saved['k']} and k_final {k}: its scale is alpha / k "
            "of the first or of the last k, which the file does not say. It cannot be read."
        )
    scale = saved["alpha"] / (saved["r"] if saved["alpha_over_r"] else k)
    if saved["dense_baseline"] or not saved["use_topk"]:
        return "none", None, scale
    if not saved["relu_latents"] or saved["topk_mode"] not in ("topk", "batchtopk"):
        what = "relu_latents false" if not saved["relu_latents"] else f"topk_mode {saved['topk_mode']!r}"
        raise InputError(f"{path / TOPK_CONFIG} has {what}, which this version does not compute.")
    return "topk", k, scale  # a batchtopk adapter evaluates token by token there


def write_published(adapter: TopKLoRA, folder: str | Path, *, base: str) -> None:
    """Write the adapter in the published layout, and warn.

    Raises:
        InputError: it adapts the embedding, or its gate has no place in the layout.
    """
    path, config = Path(folder), adapter.config
    if any(isinstance(site, SparseLoRATable) for site in adapter.sites.values()) or config.gate not in ("topk", "none"):
        raise InputError("the published layout has no adapted embedding and no gate but topk. Save it as ours.")
    scale = next(iter(adapter.sites.values())).scale
    modules = sorted({name.rsplit(".", 1)[-1] for name in adapter.sites})
    weights = {}
    for name, site in adapter.sites.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = site.A.detach()
        weights[f"{PREFIX}{name}.lora_B.weight"] = site.B.detach()
    files.write_tensors(path / WEIGHTS, weights)
    k = config.k or config.rank
    topk = {"r": config.rank, "alpha": scale * config.rank, "k": k, "k_final": k, "alpha_over_r": True,
            "use_topk": config.gate == "topk", "dense_baseline": config.gate == "none", "relu_latents": True,
            "topk_mode": "topk", "hard_eval": True, "target_modules": modules, "dropout": 0.0}  # fmt: skip
    files.write_json(path / TOPK_CONFIG, topk, foreign=True)
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
            "lora_alpha": scale * config.rank, "target_modules": modules, "layers_to_transform": config.layers,
            "bias": "none", "lora_dropout": 0.0}  # fmt: skip
    files.write_json(path / PEFT_CONFIG, peft, foreign=True)
    say(f"warning: plain PEFT takes {path} for a dense LoRA and says nothing; only {TOPK_CONFIG} tells it apart.")


def read_circuits(folder: str | Path) -> dict[str, list[Any]]:
    """Return the latents of each circuit beside a published adapter, by file name, as they are written there.

    Raises:
        InputError: there are none.
        CorruptData: a file is not JSON, or holds no `kept_latents`.
    """
    found = sorted(Path(folder).glob("circuits/*.json"))
    if not found:
        raise InputError(f"{folder} holds no circuits/*.json.")
    circuits = {}
    for path in found:
        try:
            circuits[path.stem] = list(json.loads(path.read_bytes())["kept_latents"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CorruptData(f"{path} holds no kept_latents. Download it again.") from None
    return circuits
