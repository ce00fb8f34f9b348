"""What a run folder can show, and the pair of models that it is of.

A folder holds one kind itself, and others directly inside it, each under the name of its folder: `found`. `pair_of`
says which models a kind is of, `load_kind` puts it on them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.models.names import hash_model
from crosscoders.models.pair import ModelPair
from diffing.decomposition.saving import DESCRIPTION, read_description
from diffing.explorer.crosscoder import CrosscoderKind
from diffing.explorer.decomposition import DecompositionKind
from diffing.explorer.kinds import Kind
from diffing.explorer.shared_sae import SaeKind, SaeRecord
from diffing.explorer.topk_lora import TopKLoRAKind
from diffing.latents.runs import open_run_and_cache
from diffing.topk_lora.command import RUN, read_config

CROSSCODER = "crosscoder"
RESIDUAL = "blocks.0.hook_resid_post"
"""Where models are read that any point of the residual stream would do for."""


class Held(NamedTuple):
    """What a file of a folder says is in it."""

    name: str
    """Where the run folder itself is one."""
    title: str
    load: Callable[[Path, Callable[[], ModelPair]], Kind]


FILES = {
    RUN: Held("topk-lora", "directions of the TopKLoRA", TopKLoRAKind),
    "sae.json": Held("sae", "latents of one SAE", SaeKind),
    DESCRIPTION: Held("decompose", "pieces of the decomposition", DecompositionKind),
}


class Source(NamedTuple):
    """The models that something was made of."""

    base: str
    tuned: str
    tokenizer: str | None
    hook_point: str


def found(run: str | Path) -> dict[str, Path]:
    """Return what a folder holds, by name, the folder's own first.

    Raises:
        InputError: it is no folder.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"{str(run)!r} is not a folder. Name a run folder.")
    kinds = {CROSSCODER: folder} if (folder / "latents.json").is_file() else {}
    for inside in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        held = _held(inside)
        if held is not None:
            kinds[held.name if inside == folder else inside.name] = inside
    return kinds or {CROSSCODER: folder}  # whose own errors say what is missing


def pair_of(name: str, folder: Path, cache: str | None) -> Source:
    """Return the models that a kind is of."""
    if name == CROSSCODER:
        opened = open_run_and_cache(str(folder), cache)[1]
        config = opened.config
        return Source(config.base, config.tuned, config.tokenizer, opened.manifest["hook_point"])
    if (folder / RUN).is_file():
        topk = read_config(folder, "auto")
        return Source(topk.base, topk.tuned, None, RESIDUAL)
    if (folder / "sae.json").is_file():
        sae = ActivationCache(files.read_model(folder / "sae.json", SaeRecord)["cache"]["path"])
        return Source(sae.config.base, sae.config.tuned, sae.config.tokenizer, sae.manifest["hook_point"])
    models = read_description(folder)[1]
    return Source(models["base"]["name"], models["tuned"]["name"], None, RESIDUAL)


def require_same_models(ours: Source, theirs: Source, name: str) -> None:
    """Raise InputError unless two kinds are of the same two models."""
    for one, other in ((ours.base, theirs.base), (ours.tuned, theirs.tuned)):
        if hash_model(one) != hash_model(other):
            raise InputError(f"{name} is of {other!r}, and the models in memory are {one!r}. Open its folder alone.")


def load_kind(name: str, folder: Path, cache: str | None, load: Callable[[], ModelPair]) -> Kind:
    """Return one of the kinds; load: gives the models, once the files are read."""
    if name == CROSSCODER:
        return CrosscoderKind(folder, open_run_and_cache(str(folder), cache)[1], load)
    held = _held(folder)
    assert held is not None
    return held.load(folder, load)


def title_of(name: str, folder: Path) -> str:
    """Return what one of the kinds is called."""
    held = _held(folder)
    return "latents of the crosscoder" if name == CROSSCODER or held is None else held.title


def _held(folder: Path) -> Held | None:
    return next((held for file, held in FILES.items() if (folder / file).is_file()), None)
