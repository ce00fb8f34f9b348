"""Files -> a frozen dictionary. `inspect_dictionary` reads headers and settings only, `load_dictionary` the weights.

Layouts: Gemma Scope (`params.npz`), SAELens (`cfg.json` + `sae_weights.safetensors`), our crosscoders and those that
`crosscoders.load_crosscoder` reads; names of published ones go to `hub`. Described in docs/formats.md.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.records import Record
from crosscoders.formats.load import load_crosscoder
from crosscoders.formats.neighbours import neighbour
from crosscoders.formats.ours import FORMAT, CrosscoderRecord, trained_on
from crosscoders.models import hooks
from sae_lora.dictionaries import gemma_scope, hub
from sae_lora.dictionaries.frozen import (
    CrosscoderSide,
    DictionaryInfo,
    FrozenDictionary,
    JumpReLU,
    PairSide,
    SaeLens,
    Side,
)
from sae_lora.dictionaries.places import chosen_hook_point

ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
"""What SAELens applies and undoes by itself. expected_average_only_in needs a factor that the folder does not hold."""
READ = (
    "What is read: params.npz of Gemma Scope, cfg.json with sae_weights.safetensors of SAELens, names RELEASE/ID of "
    "its list, and crosscoders."
)
_SAE_LENS_CHANGES_NOTHING = ("device", "dtype", "metadata", "architecture")


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
            config = hub.config_of(published)
            allowed = NORMALISATIONS if published.scale is None else (*NORMALISATIONS, "expected_average_only_in")
            return _sae_lens_info(config, str(path), hook_point, model_type, allowed)
        return replace(
            inspect_dictionary(published, hook_point=hook_point, side=side, model_type=model_type), path=str(path)
        )
    layout = _layout(given)
    if layout != "crosscoder":
        _require_no_side(side, path)
    if layout == "gemma-scope":
        return _inspect_gemma_scope(given / "params.npz" if given.is_dir() else given, hook_point, model_type)
    if layout == "sae-lens":
        return _inspect_sae_lens(given, hook_point, model_type)
    what = neighbour(given)
    if what is not None:
        raise InputError(f"{str(path)!r} is {what}. {READ}")
    return _inspect_crosscoder(given, hook_point, side, model_type)


def reads_two_models(path: str | Path) -> bool:
    """Say whether it is a local crosscoder of two models, which has sides."""
    given = Path(path)
    return given.exists() and _layout(given) == "crosscoder" and _crosscoder_shape(given)[0].get("n_models") == 2


def _layout(given: Path) -> Literal["gemma-scope", "sae-lens", "crosscoder"]:
    archive = given / "params.npz" if given.is_dir() else given
    if archive.suffix == ".npz" and archive.is_file():
        return "gemma-scope"
    if not (given / "cfg.json").is_file():
        return "crosscoder"
    # SAELens wrote no architecture at first.
    has_weights = (given / "sae_weights.safetensors").is_file()
    return "sae-lens" if has_weights or "architecture" in files.read_model(given / "cfg.json", Record) else "crosscoder"


def read_dictionary(info: DictionaryInfo, other: nn.Module | None = None) -> FrozenDictionary:
    """Read the weights of an inspected dictionary; `other`: the crosscoder's other model, see `PairSide`."""
    path = Path(info.path)
    fetched = path if path.exists() else hub.fetch(info.path)
    if info.layout == "sae-lens":
        return _read_sae_lens(info, fetched)
    assert isinstance(fetched, Path)
    if info.layout == "gemma-scope":
        archive = fetched / "params.npz" if fetched.is_dir() else fetched
        return JumpReLU(info, gemma_scope.read_arrays(archive)).requires_grad_(False)
    crosscoder = load_crosscoder(path)
    sizes = (crosscoder.b_dec.shape[1], crosscoder.config.dict_size)
    if sizes != (info.d_model, info.dict_size):
        raise CorruptData(f"{path} has (d_model, dict_size) {sizes}, its config says {(info.d_model, info.dict_size)}.")
    return CrosscoderSide(info, crosscoder) if other is None else PairSide(info, crosscoder, other)


def _require_no_side(side: Side | None, path: str | Path) -> None:
    if side is not None:
        raise InputError(f"side {side!r} is for crosscoders of two models; {str(path)!r} is an SAE. Leave it out.")


# ---------------------------------------------------------------------------------------------------- Gemma Scope


_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
"""Where the releases of Gemma Scope sit, as SAELens has it."""


def _inspect_gemma_scope(path: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    shapes = gemma_scope.read_shapes(path)
    # Published as <release>/layer_20/width_16k/average_l0_71/params.npz; in the hub's cache models--google-- precedes.
    where = path.absolute().as_posix()
    layer = re.search(r"/layer_(\d+)/width_\w+/", where)
    site = re.search(r"gemma-scope-\w+-\w+-(res|mlp|att|transcoders)(-canonical)?/", where)
    if site and site[1] == "transcoders":
        raise InputError(f"{str(path)!r} is a transcoder, which computes the MLP's output from its input; give an SAE.")
    named = f"blocks.{layer[1]}.{_SITES[site[1]]}" if layer and site else None
    settings = {"gate": "jumprelu", "apply_b_dec_to_input": False}
    chosen = chosen_hook_point(named, hook_point, path, model_type)
    if layer and hooks.layer_of(chosen) != int(layer[1]):
        raise InputError(f"{str(path)!r} is of layer {layer[1]}, not at {chosen!r}. Give a hook point of that layer.")
    return DictionaryInfo("gemma-scope", str(path), chosen, shapes.d_model, shapes.dict_size, settings)


# -------------------------------------------------------------------------------------------------------- SAELens


class SaeLensRecord(Record):
    """cfg.json of SAELens, as far as it is read without looking closer."""

    again = "save the SAE again"
    d_in: Any
    d_sae: Any
    metadata: dict[str, Any] | None = None


def _inspect_sae_lens(folder: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    config = files.read_model(folder / "cfg.json", SaeLensRecord)
    return _sae_lens_info(
        config, str(folder), hook_point, model_type, NORMALISATIONS,
        lambda: _require_shapes(folder, config["d_in"], config["d_sae"]),
    )  # fmt: skip


def _sae_lens_info(
    config: dict[str, Any],
    path: str,
    hook_point: str | None,
    model_type: str | None,
    normalisations: tuple[str, ...],
    require_shapes: Callable[[], None] = lambda: None,
) -> DictionaryInfo:
    # SAELens drops `metadata` when it has no sae_lens_version, hook name included; so it is read here, in either place.
    metadata = config.get("metadata") or {}

    def known(*keys: str) -> Any:
        return next((place[key] for key in keys for place in (metadata, config) if place.get(key) is not None), None)

    place = known("hook_name", "hook_point")
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation not in ("relu", "topk"):
        raise InputError(f"{path} has activation_fn {activation!r}, which SAELens reads as relu; relu or topk is read.")
    # What SAELens takes where a folder from before these keys says nothing.
    architecture = config.get("architecture") or ("topk" if activation == "topk" else "standard")
    reshape = config.get("reshape_activations") or ("hook_z" if "hook_z" in str(place) else "none")
    if architecture not in ARCHITECTURES:
        raise InputError(f"{path} has architecture {architecture!r}; {', '.join(ARCHITECTURES)} can be spliced.")
    if not all(isinstance(config[key], int) and config[key] > 0 for key in ("d_in", "d_sae")):
        raise InputError(f"{path} has d_in {config['d_in']!r} and d_sae {config['d_sae']!r}; expected whole numbers.")
    normalisation = config.get("normalize_activations") or "none"
    normalisation = "expected_average_only_in" if normalisation is True else normalisation
    if normalisation not in normalisations:
        raise InputError(
            f"{path} has normalize_activations {normalisation!r}; {', '.join(normalisations)} can be spliced. Fold "
            "it into the weights first."
        )
    if reshape != "none" or known("hook_head_index") is not None:
        raise InputError(f"{path} reads attention heads, reshaped; only whole activations can be spliced.")
    processing = known("model_from_pretrained_kwargs") or {}
    if changed := [key for key, value in processing.items() if value is True and key.startswith(("fold_", "center_"))]:
        raise InputError(
            f"{path} was trained on a model whose weights TransformerLens changed ({', '.join(changed)}), so that its "
            "activations are others. Use an SAE of the model as published."
        )
    require_shapes()
    settings = {key: value for key, value in sorted(config.items()) if key not in _SAE_LENS_CHANGES_NOTHING}
    name = known("model_name")
    return DictionaryInfo(
        layout="sae-lens",
        path=path,
        hook_point=chosen_hook_point(place, hook_point, path, model_type),
        d_model=config["d_in"],
        dict_size=config["d_sae"],
        settings={"architecture": architecture, **settings},
        model_names=(str(name),) if name else (),
    )


def _require_shapes(folder: Path, d_in: int, d_sae: int) -> None:
    from safetensors import SafetensorError, safe_open

    path = folder / "sae_weights.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} has a cfg.json but no sae_weights.safetensors. Download or save the SAE again.")
    files.refuse_lfs_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptData(f"{path} is not a safetensors file ({error}). Download or make it again.") from None
    for name, shape in (("W_enc", (d_in, d_sae)), ("W_dec", (d_sae, d_in)), ("b_dec", (d_in,))):
        if shapes.get(name) != shape:
            transposed = " It is transposed." if len(shape) == 2 and shapes.get(name) == shape[::-1] else ""
            raise InputError(
                f"{path}: {name!r} has shape {shapes.get(name)}, expected {shape} from its cfg.json.{transposed} Use "
                "the files as published."
            )


def _read_sae_lens(info: DictionaryInfo, source: Path | hub.Converted) -> FrozenDictionary:
    from sae_lens import SAE

    try:
        sae = hub.sae_of(source) if isinstance(source, hub.Converted) else SAE.load_from_disk(source, device="cpu")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"SAELens does not load {info.path!r}: {cause}. Save the SAE again.") from error
    sae.cfg.metadata.hook_name = info.hook_point
    return SaeLens(info, sae)


# ----------------------------------------------------------------------------------------------------- crosscoders


def _crosscoder_shape(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a crosscoder, and the record of the activations that it was trained on."""
    config_path = path / "config.json"
    if config_path.is_file() and files.read_model(config_path, Record).get("format") == FORMAT:
        return dict(files.read_model(config_path, CrosscoderRecord)["crosscoder"]), trained_on(path)
    n_models, d_model, dict_size = load_crosscoder(path).W_enc.shape  # layouts of others say it in the weights only
    return {"n_models": n_models, "d_model": d_model, "dict_size": dict_size}, {}


def _inspect_crosscoder(
    path: Path, hook_point: str | None, side: Side | None, model_type: str | None
) -> DictionaryInfo:
    shape, source = _crosscoder_shape(path)
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
