"""Sides of a crosscoder, as dictionaries of one model."""

from pathlib import Path
from typing import Any

from torch import nn

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.records import Record
from crosscoders.formats.load import load_crosscoder
from crosscoders.formats.ours import FORMAT, CrosscoderRecord, trained_on
from sae_lora.dictionaries.frozen import CrosscoderSide, DictionaryInfo, FrozenDictionary, PairSide, Side
from sae_lora.dictionaries.places import chosen_hook_point


def shape_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a crosscoder, and the record of the activations that it was trained on."""
    config_path = path / "config.json"
    if config_path.is_file() and files.read_model(config_path, Record).get("format") == FORMAT:
        return dict(files.read_model(config_path, CrosscoderRecord)["crosscoder"]), trained_on(path)
    n_models, d_model, dict_size = load_crosscoder(path).W_enc.shape  # layouts of others say it in the weights only
    return {"n_models": n_models, "d_model": d_model, "dict_size": dict_size}, {}


def inspect(path: Path, hook_point: str | None, side: Side | None, model_type: str | None) -> DictionaryInfo:
    shape, source = shape_of(path)
    n_models, d_model, dict_size = (int(shape[key]) for key in ("n_models", "d_model", "dict_size"))
    if n_models == 2 and side is None:
        raise InputError(f"crosscoder {str(path)!r} reads two models. Give its side: base, tuned or both.")
    if n_models == 1 and side is not None:
        raise InputError(f"crosscoder {str(path)!r} reads one model, so side {side!r} has no effect. Leave it out.")
    if n_models > 2:
        raise InputError(f"crosscoder {str(path)!r} reads {n_models} models; one or two can be spliced.")
    trained = [source[name] for name in ("base", "tuned") if name in source]
    return DictionaryInfo(
        layout="crosscoder",
        path=str(path),
        hook_point=chosen_hook_point(source.get("hook_point"), hook_point, path, model_type),
        d_model=d_model,
        dict_size=dict_size,
        settings={key: value for key, value in sorted(shape.items())},
        side=side,
        model_names=tuple(str(entry["name"]) for entry in trained),
        model_hashes=tuple(str(entry["hash"]) for entry in trained),
    )


def read(info: DictionaryInfo, path: Path, other: nn.Module | None = None) -> FrozenDictionary:
    """Read the weights; `other`: the crosscoder's other model, see `PairSide`."""
    crosscoder = load_crosscoder(path)
    sizes = (crosscoder.b_dec.shape[1], crosscoder.config.dict_size)
    if sizes != (info.d_model, info.dict_size):
        raise CorruptData(f"{path} has (d_model, dict_size) {sizes}, its config says {(info.d_model, info.dict_size)}.")
    return CrosscoderSide(info, crosscoder) if other is None else PairSide(info, crosscoder, other)
