"""Which layout a local folder or file has, told by the names of its files and its settings alone."""

import os
import re
from pathlib import Path

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.formats.gemma_scope_2 import is_over_layers
from crosscoders.formats.neighbours import neighbour
from sae_lora.dictionaries.frozen import Layout
from sae_lora.dictionaries.qwen_scope import FILE

READ = (
    "What is read: params.npz of Gemma Scope, params.safetensors of Gemma Scope 2, ae.pt with config.json of "
    "dictionary_learning, layerN.sae.pt of Qwen Scope, cfg.json with sae.safetensors of sparsify or "
    "sae_weights.safetensors of SAELens, names RELEASE/ID of its list, and crosscoders."
)

CROSSCODERS = ("model.safetensors", "model_final.pt", "ae.pt", "cc_weights.pt")
WEIGHTS = ("params.safetensors", "params.npz", "ae.pt", "sae.safetensors", "sae_weights.safetensors", "layer*.sae.pt")


def layout_of(given: Path) -> Layout:
    """Return the layout of what is there.

    Raises:
        InputError: a folder of another toolkit, by its name; a folder without weights.
    """
    archive = given / "params.npz" if given.is_dir() else given
    if archive.suffix == ".npz" and archive.is_file():
        return "gemma-scope"
    if given.name == "params.safetensors" or (given / "params.safetensors").is_file():
        return "gemma-scope-2"
    if any(FILE.fullmatch(name) for name in ([given.name] if given.is_file() else os.listdir(given))):
        return "qwen-scope"
    if is_over_layers(given):
        return "layer-crosscoder"
    if given.name == "sae.safetensors" or (given / "sae.safetensors").is_file():
        return "sparsify"
    if _is_sae_of_dictionary_learning(given):
        return "dictionary-learning"
    if (given / "cfg.json").is_file():
        # SAELens wrote no architecture at first.
        has_weights = (given / "sae_weights.safetensors").is_file()
        if has_weights or "architecture" in files.read_model(given / "cfg.json", Record):
            return "sae-lens"
    what = neighbour(given)
    if what is not None:
        raise InputError(f"{str(given)!r} is {what}. {READ}")
    if given.is_dir() and not any((given / name).is_file() for name in CROSSCODERS):
        raise InputError(f"{str(given)!r} holds no dictionary: {_contents(given)}. {READ}")
    return "crosscoder"


def _contents(folder: Path) -> str:
    """Return what a folder holds, in words: the first dictionary below it, or else its files."""
    for depth in ("*", "*/*"):
        for name in WEIGHTS:
            if inner := sorted(folder.glob(f"{depth}/{name}")):
                return f"it holds folders of them, such as {str(inner[0].parent)!r}"
    return f"it holds {', '.join(sorted(os.listdir(folder))[:5]) or 'nothing'}"


def _is_sae_of_dictionary_learning(given: Path) -> bool:
    weights = given / "ae.pt" if given.is_dir() else given
    config = weights.parent / "config.json"
    if weights.name != "ae.pt" or not weights.is_file() or not config.is_file():
        return False
    trainer = files.read_model(config, Record).get("trainer")
    dict_class = str(trainer.get("dict_class") or "") if isinstance(trainer, dict) else ""
    return dict_class != "" and not re.search("crosscoder|transcoder", dict_class.lower())
