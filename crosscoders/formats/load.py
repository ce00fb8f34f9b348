"""Read the crosscoders that we and others publish; never unpickles code.

`load_crosscoder` finds out which layout a folder has and hands it to one reader:
    ours                   config.json with our format name + model.safetensors (run folders too)
    dictionary_learning    config.json + model.safetensors, or a state dict in model_final.pt / ae.pt
    Gemma Scope 2          config.json + params_layer_{0..n-1}.safetensors, over layers of one model
    ckkissane              cfg.json + cc_weights.pt, inputs expected already scaled
Layouts are described in docs/formats.md.
"""

from pathlib import Path

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.hub import repository_folder
from crosscoders.common.records import Record
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.formats.ckkissane import _read_ckkissane
from crosscoders.formats.dictionary_learning import _read_dictionary_learning
from crosscoders.formats.gemma_scope_2 import _read_gemma_scope_2, is_over_layers
from crosscoders.formats.neighbours import neighbour
from crosscoders.formats.ours import FORMAT, _read_ours


def load_crosscoder(
    path_or_repo: str | Path, *, input_scale: list[float] | None = None, device: str = "cpu"
) -> Crosscoder:
    """Return a crosscoder from a local folder or weights file, or from a hub repository.

    input_scale: the factor of each model's activations, for the ckkissane layout only, whose files do not hold it:
    sqrt(d_model) / mean ||x||, base first. Without it the weights are taken to expect activations as they are.

    Raises:
        InputError: nothing there, an unknown layout, a file that needs unpickling, a git-lfs pointer.
        CorruptData: weights that do not match their checksum or each other.
    """
    folder = repository_folder(path_or_repo)
    weights = None
    if folder.is_file():
        weights, folder = folder, folder.parent
    if weights is None and is_over_layers(folder):
        if input_scale is not None:
            raise InputError(
                "input_scale is for the ckkissane layout; Gemma Scope 2 reads activations as they are. Leave it out."
            )
        return _read_gemma_scope_2(folder).to(device)
    what = neighbour(weights or folder)
    if what is not None:
        raise InputError(
            f"{str(path_or_repo)!r} is {what}. Crosscoders of ours, of dictionary_learning, Gemma Scope 2 and "
            "ckkissane are read here; sae_lora.load_dictionary reads SAEs."
        )
    config_path = next((folder / name for name in ("config.json", "cfg.json") if (folder / name).is_file()), None)
    if config_path is None:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{path_or_repo} holds no crosscoder: no config.json or cfg.json beside the weights (found {there})."
        )
    config = files.read_model(config_path, Record)
    if config_path.name == "cfg.json":
        weights = weights or folder / "cc_weights.pt"
        if not weights.is_file():
            raise InputError(
                f"{folder} has a cfg.json but no weights that are read: cc_weights.pt of a crosscoder, or "
                "sae_weights.safetensors of an SAE. Check the folder's name."
            )
        model = _read_ckkissane(config, weights, input_scale)
    elif input_scale is not None:
        raise InputError(
            "input_scale is for the ckkissane layout; these weights carry their own normaliser. Leave it out."
        )
    elif config.get("format") == FORMAT:
        model = _read_ours(config_path)
    else:
        model = _read_dictionary_learning(config, weights or _first_weights(folder))
    return model.to(device)


def _first_weights(folder: Path) -> Path:
    for name in ("model.safetensors", "model_final.pt", "ae.pt"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} has a config.json but no weights: expected model.safetensors, model_final.pt or ae.pt.")
