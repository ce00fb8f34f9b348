"""Files -> a frozen dictionary. `inspect_dictionary` reads headers and settings only, `load_dictionary` the weights.

`detection` tells the layouts apart, one module reads each; names of published ones go to `hub`. Described in
docs/formats.md.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from crosscoders.common.errors import InputError
from sae_lora.dictionaries import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    hub,
    layers,
    qwen_scope,
    sae_lens,
    sides,
    sparsify,
)
from sae_lora.dictionaries.detection import layout_of
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, Side

_READERS = {
    "gemma-scope": gemma_scope,
    "gemma-scope-2": gemma_scope_2,
    "dictionary-learning": dictionary_learning,
    "qwen-scope": qwen_scope,
    "sparsify": sparsify,
    "layer-crosscoder": layers,
    "sae-lens": sae_lens,
}
"""Layout of an SAE -> the module that inspects and reads it."""


def load_dictionary(
    path: str | Path, *, hook_point: str | None = None, side: Side | None = None, d_model: int | None = None
) -> FrozenDictionary:
    """Load a frozen dictionary from a local folder or file, or from the hub as RELEASE/ID (`hub`).

    hook_point: where it belongs, for files that do not say it; a file that says another one is refused. side: of a
    crosscoder of two models. d_model: width of the model, checked before the weights are read.

    Raises:
        InputError: as `inspect_dictionary`; another width than d_model.
        CorruptData: weights that are not what their headers say.
    """
    info = inspect_dictionary(path, hook_point=hook_point, side=side)
    if d_model is not None and info.d_model != d_model:
        raise InputError(
            f"dictionary {str(path)!r} has d_model {info.d_model} but the model has {d_model}. "
            "Choose a dictionary of this model."
        )
    return read_dictionary(info)


def inspect_dictionary(
    path: str | Path, *, hook_point: str | None = None, side: Side | None = None, model_type: str | None = None
) -> DictionaryInfo:
    """Read everything that can be known without reading weights.

    model_type: architecture of the model as transformers names it, which decides what some names of places mean.

    Raises:
        InputError: nothing there, nor on the hub; an unknown layout, architecture or normalisation, shapes that do not
            fit each other, no hook point or two different ones, a side that is missing or means nothing.
        CorruptData: an archive or header that is damaged.
    """
    given = Path(path)
    if not given.exists():
        published = hub.fetch(str(path))
        if isinstance(published, hub.Converted):
            _require_no_side(side, path)
            return sae_lens.inspect_converted(published, str(path), hook_point, model_type)
        return replace(
            inspect_dictionary(published, hook_point=hook_point, side=side, model_type=model_type), path=str(path)
        )
    layout = layout_of(given)
    if layout == "crosscoder":
        return sides.inspect(given, hook_point, side, model_type)
    _require_no_side(side, path)
    return _READERS[layout].inspect(given, hook_point, model_type)


def reads_two_models(path: str | Path) -> bool:
    """Say whether it is a local crosscoder of two models, which has sides."""
    given = Path(path)
    return given.exists() and layout_of(given) == "crosscoder" and sides.shape_of(given)[0].get("n_models") == 2


def read_dictionary(info: DictionaryInfo, other: nn.Module | None = None) -> FrozenDictionary:
    """Read the weights of an inspected dictionary; `other`: the model that a crosscoder runs
    beside, see `PairSide` and `layers`."""
    path = Path(info.path)
    source = path if path.exists() else hub.fetch(info.path)
    if isinstance(source, hub.Converted):
        return sae_lens.read_converted(info, source)
    if info.layout == "crosscoder":
        return sides.read(info, source, other)
    if info.layout == "layer-crosscoder":
        return layers.read(info, source, other)
    return _READERS[info.layout].read(info, source)


def _require_no_side(side: Side | None, path: str | Path) -> None:
    if side is not None:
        raise InputError(f"side {side!r} is for crosscoders of two models; {str(path)!r} is an SAE. Leave it out.")
