"""Read the crosscoders that we and others publish; never unpickles code.

`load_crosscoder` finds out which layout a folder has and hands it to one reader:
    ours                   config.json with our format name + model.safetensors (run folders too)
    dictionary_learning    config.json + model.safetensors, or a state dict in model_final.pt / ae.pt
    ckkissane              cfg.json + cc_weights.pt, inputs expected already scaled
Layouts are described in docs/formats.md.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoders import store
from crosscoders.config import CrosscoderConfig
from crosscoders.errors import CorruptData, InputError
from crosscoders.model import FORMAT_VERSION, Crosscoder

CODE_NORMALIZATION_IDS = {1: "sum", 2: "concat", 4: "none"}
"""Ids of the buffer `code_normalization_id`; 3 (mixed) and 5 (decoupled) are not supported."""


def load_crosscoder(
    path_or_repo: str | Path, *, input_scale: list[float] | None = None, device: str = "cpu"
) -> Crosscoder:
    """A crosscoder from a local folder or weights file, or from a hub repository.

    input_scale: the factor of each model's activations, for the ckkissane layout only, whose files do not hold it:
    sqrt(d_model) / mean ||x||, base first. Without it the weights are taken to expect activations as they are.

    Raises:
        InputError: nothing there, an unknown layout, a file that needs unpickling, a git-lfs pointer.
        CorruptData: weights that do not match their checksum or each other.
    """
    folder = _local_folder(path_or_repo)
    weights = None
    if folder.is_file():
        weights, folder = folder, folder.parent
    config_path = next((folder / name for name in ("config.json", "cfg.json") if (folder / name).is_file()), None)
    if config_path is None:
        found = ", ".join(sorted(f.name for f in folder.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{path_or_repo} holds no crosscoder: no config.json or cfg.json beside the weights (found {found})."
        )
    config = store.read_object(config_path)
    if config_path.name == "cfg.json":
        model = _read_ckkissane(config, weights or folder / "cc_weights.pt", input_scale)
    elif input_scale is not None:
        raise InputError(
            "input_scale is for the ckkissane layout; these weights carry their own normaliser. Leave it out."
        )
    elif config.get("format") == "model-diffing/crosscoder":
        model = _read_ours(config, config_path)
    else:
        model = _read_dictionary_learning(config, weights or _first_weights(folder))
    return model.to(device)


def _local_folder(path_or_repo: str | Path) -> Path:
    path = Path(path_or_repo)
    if path.exists():
        return path
    name = str(path_or_repo)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"there is no {name!r}. Check the path, or give a hub repository as owner/name.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.pt"]))
    except (OSError, ValueError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name!r} is neither a folder nor a repository that can be read ({cause}).") from None


def _first_weights(folder: Path) -> Path:
    for name in ("model.safetensors", "model_final.pt", "ae.pt"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} has a config.json but no weights: expected model.safetensors, model_final.pt or ae.pt.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or .pt file, in float32 where they are floats.

    Raises:
        InputError: no such file, a git-lfs pointer, or a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return store.read_tensors(path)
    if not path.is_file():
        raise InputError(f"there is no {path}. Check the folder's name.")
    store.refuse_lfs_pointer(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is refused: it needs unpickling of more than tensors, or is no checkpoint "
            f"({str(error).splitlines()[0]}). Ask for safetensors, or convert it where it was made."
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} is not a plain state dict of tensors. Save model.state_dict() alone.")
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def _read_ours(config: dict[str, Any], path: Path) -> Crosscoder:
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {config.get('format_version')}; this version reads {FORMAT_VERSION}."
        )
    try:
        model = Crosscoder(CrosscoderConfig(**config["crosscoder"]))
        expected = store.Written(**config["weights"])
    except (KeyError, TypeError) as error:
        raise CorruptData(f"{path} lacks or has an unknown entry: {error}. Save the crosscoder again.") from None
    return _filled(model, store.read_tensors(path.parent / "model.safetensors", expected), path)


def _filled(model: Crosscoder, tensors: Mapping[str, Tensor], source: Path) -> Crosscoder:
    """The model with these tensors, after checking names and shapes."""
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in tensors:
            raise CorruptData(f"{source} has no tensor {name!r}. Download or save the crosscoder again.")
        if tensors[name].shape != value.shape:
            raise CorruptData(
                f"{source}: {name!r} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}."
            )
    model.load_state_dict({name: tensors[name].to(value.dtype) for name, value in wanted.items()})
    return model.requires_grad_(False)


def _read_dictionary_learning(config: dict[str, Any], weights: Path) -> Crosscoder:
    """Buffers decide over the config: k, threshold, code normalisation and normaliser may be missing from it."""
    tensors = read_weights(weights)
    if "encoder.weight" not in tensors or tensors["encoder.weight"].ndim != 3:
        raise InputError(
            f"{weights} is not a crosscoder of a known layout: its tensors are {', '.join(sorted(tensors)[:5])}."
        )
    n_models, d_model, dict_size = tensors["encoder.weight"].shape
    norm_id = int(tensors.get("code_normalization_id", torch.tensor(1)))
    if norm_id not in CODE_NORMALIZATION_IDS:
        raise InputError(f"{weights} has code normalisation id {norm_id} (mixed or decoupled), which is not supported.")
    config = config.get("trainer", config)  # training checkpoints keep the settings one level down
    batchtopk = "k" in tensors or "BatchTopK" in str(config.get("dict_class", ""))
    shape = CrosscoderConfig(
        dict_size=dict_size,
        d_model=d_model,
        n_models=n_models,
        activation="batchtopk" if batchtopk else "relu",
        k=int(tensors["k"]) if "k" in tensors else config.get("k") if batchtopk else None,
        code_norm=CODE_NORMALIZATION_IDS[norm_id],  # type: ignore[arg-type]
    )
    mean, scale = _normaliser(tensors, n_models, d_model)
    canonical = {
        "W_enc": tensors["encoder.weight"],
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].permute(1, 0, 2),
        "b_dec": tensors["decoder.bias"],
        "input_mean": mean,
        "input_scale": scale,
        "threshold": tensors.get("threshold", torch.tensor(-1.0)),
        "is_folded": torch.tensor(False),
    }
    return _filled(Crosscoder(shape), canonical, weights)


def _normaliser(tensors: Mapping[str, Tensor], n_models: int, d_model: int) -> tuple[Tensor, Tensor]:
    """Mean and scale of each model: x' = (x - mean) target_rms / sqrt(sum_i std_i^2); NaN in the buffers means none."""
    mean, std = tensors.get("activation_mean"), tensors.get("activation_std")
    if mean is None or std is None or mean.isnan().any() or std.isnan().any():
        return torch.zeros(n_models, d_model), torch.ones(n_models)
    target = tensors.get("target_rms", torch.tensor(1.0))
    return mean, target / (std.pow(2).sum(dim=1) + 1e-8).sqrt()


def _read_ckkissane(config: dict[str, Any], weights: Path, input_scale: list[float] | None) -> Crosscoder:
    tensors = read_weights(weights)
    missing = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name not in tensors]
    if missing:
        raise InputError(f"{weights} has no tensor {missing[0]!r}; its tensors are {', '.join(sorted(tensors)[:5])}.")
    n_models, d_model, dict_size = tensors["W_enc"].shape
    if config.get("dict_size") not in (None, dict_size):
        raise CorruptData(
            f"cfg.json says dict_size {config['dict_size']} but {weights} has {dict_size}. Download both again."
        )
    if input_scale is not None and len(input_scale) != n_models:
        raise InputError(f"input_scale has {len(input_scale)} factors; this crosscoder reads {n_models} models.")
    shape = CrosscoderConfig(
        dict_size=dict_size, d_model=d_model, n_models=n_models, activation="relu", code_norm="sum"
    )
    canonical = {
        **{name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")},
        "input_mean": torch.zeros(n_models, d_model),
        "input_scale": torch.ones(n_models) if input_scale is None else torch.tensor(input_scale),
        "threshold": torch.tensor(-1.0),
        "is_folded": torch.tensor(False),
    }
    return _filled(Crosscoder(shape), canonical, weights)
