"""Folders of other toolkits that hold no crosscoder that is read here: what they are, in words."""

import re
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.records import Record


def neighbour(path: Path) -> str | None:
    """Say what a folder or weights file of another toolkit is; None where its kind is not known, or is one we read."""
    folder, names = (path.parent, {path.name}) if path.is_file() else (path, {f.name for f in path.iterdir()})
    config = _settings(folder)
    if "sae.safetensors" in names:
        return _kind("sparsify", is_transcoder=config.get("transcode") is True)
    if any(re.fullmatch(r"layer\d+\.sae\.pt", name) for name in names):
        return _kind("Qwen Scope")
    if "params.safetensors" in names:
        return _kind("Gemma Scope 2", is_transcoder="hf_hook_point_out" in config)
    if "params.npz" in names:
        return _kind("Gemma Scope")
    if "sae_weights.safetensors" in names:
        return _kind("SAELens") + ("" if (folder / "cfg.json").is_file() else " without its cfg.json")
    if any(re.fullmatch(r"(layer|W_enc)_\d+\.safetensors", name) for name in names):
        return "a set of transcoders of circuit-tracer"
    if "model_cfg.yaml" in names:
        return "a crosscoder of crosscode"
    trainer = config.get("trainer")
    dict_class = str(trainer.get("dict_class") or "") if isinstance(trainer, dict) else ""
    if dict_class and "crosscoder" not in dict_class.lower():
        is_transcoder = "transcoder" in dict_class.lower()
        return f"{_kind('dictionary_learning', is_transcoder=is_transcoder)} ({dict_class})"
    for name, toolkit in (("sae.safetensors", "sparsify"), ("ae.pt", "dictionary_learning")):
        inner = sorted(file.parent.name for file in folder.glob(f"*/{name}")) if path.is_dir() else []
        if inner and not (folder / name).is_file():
            return f"a folder of dictionaries of {toolkit}, such as {inner[0]!r}"
    return None


def _kind(toolkit: str, *, is_transcoder: bool = False) -> str:
    if is_transcoder:
        return f"a transcoder of {toolkit}"
    return f"an SAE of {toolkit}"


def _settings(folder: Path) -> dict[str, Any]:
    path = next((folder / name for name in ("cfg.json", "config.json") if (folder / name).is_file()), None)
    return {} if path is None else files.read_model(path, Record)
