"""SAELens's folders: `cfg.json` beside `sae_weights.safetensors`; `Converted` releases of its list too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from sae_lora.dictionaries import hub
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, SaeLens
from sae_lora.dictionaries.places import chosen_hook_point
from sae_lora.dictionaries.tensors import Shape, require_shapes, shapes_of

ARCHITECTURES = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")
TIED = "matching_pursuit"
"""The encoder is the decoder."""
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
"""These load, and are refused where they are spliced."""
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
"""What SAELens applies and undoes by itself. expected_average_only_in needs a factor that the folder does not hold."""
_SAE_LENS_CHANGES_NOTHING = ("device", "dtype", "metadata", "architecture")


class SaeLensRecord(Record):
    """cfg.json of SAELens, as far as it is read without looking closer."""

    again = "save the SAE again"
    d_in: Any
    d_sae: Any
    metadata: dict[str, Any] | None = None


def inspect(folder: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    config = files.read_model(folder / "cfg.json", SaeLensRecord)
    return described(
        config, str(folder), hook_point, model_type, NORMALISATIONS,
        lambda: _require_shapes(folder, config),
    )  # fmt: skip


def described(
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
    architecture = _architecture(config, activation, path)
    reshape = config.get("reshape_activations") or ("hook_z" if "hook_z" in str(place) else "none")
    if not all(isinstance(config[key], int) and config[key] > 0 for key in ("d_in", "d_sae")):
        raise InputError(
            f"{path} has d_in {config['d_in']!r} and d_sae {config['d_sae']!r} in its cfg.json; expected whole numbers."
        )
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
        writes=str(known("hook_name_out") or "an output without a name") if architecture in TRANSCODERS else None,
    )


def _architecture(config: dict[str, Any], activation: str, path: str) -> str:
    """Return the name of what SAELens makes of a folder, also of one from before it wrote that down."""
    architecture = str(config.get("architecture") or ("topk" if activation == "topk" else "standard"))
    if architecture not in (*ARCHITECTURES, *TRANSCODERS):
        why = ", which reads whole sequences" if architecture == "temporal" else ""
        raise InputError(f"{path} has architecture {architecture!r}{why}; {', '.join(ARCHITECTURES)} can be spliced.")
    d_out = config.get("d_out", config["d_in"]) if architecture in TRANSCODERS else config["d_in"]
    if d_out != config["d_in"]:
        raise InputError(
            f"{path} reads width {config['d_in']} and writes {d_out}; only transcoders of one width are read."
        )
    return architecture


def _require_shapes(folder: Path, config: dict[str, Any]) -> None:
    d_in, d_sae = config["d_in"], config["d_sae"]
    path = folder / "sae_weights.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} has a cfg.json but no sae_weights.safetensors. Download or save the SAE again.")
    expected: dict[str, Shape] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if config.get("architecture") == TIED:
        del expected["W_enc"]
    if "skip" in str(config.get("architecture")):
        expected["W_skip"] = (d_in, d_in)
    require_shapes(path, shapes_of(path), expected, "its cfg.json")


def inspect_converted(
    published: hub.Converted, path: str, hook_point: str | None, model_type: str | None
) -> DictionaryInfo:
    """Inspect a release that SAELens converts, by the settings that it gives it."""
    allowed = NORMALISATIONS if published.scale is None else (*NORMALISATIONS, "expected_average_only_in")
    return described(hub.config_of(published), path, hook_point, model_type, allowed)


def read(info: DictionaryInfo, path: Path) -> FrozenDictionary:
    """Read the weights of an inspected folder."""
    from sae_lens import SAE

    return _as_frozen(info, lambda: SAE.load_from_disk(path, device="cpu"))


def read_converted(info: DictionaryInfo, published: hub.Converted) -> FrozenDictionary:
    """Read the weights of a release that SAELens converts."""
    return _as_frozen(info, lambda: hub.sae_of(published))


def _as_frozen(info: DictionaryInfo, load: Callable[[], Any]) -> FrozenDictionary:
    try:
        sae = load()
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"SAELens does not load {info.path!r}: {cause}. Save the SAE again.") from error
    sae.cfg.metadata.hook_name = info.hook_point
    return SaeLens(info, sae)
