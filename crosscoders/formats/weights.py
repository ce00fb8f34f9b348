"""Tensors of a weights file, and a crosscoder filled with them; never unpickles code."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.dictionary.crosscoder import Crosscoder


def read_weights(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return tensors of a safetensors or .pt file; of a .pt file on the device "meta" only their shapes.

    Raises:
        InputError: no such file, a git-lfs pointer, or a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return files.read_tensors(path)
    if not path.is_file():
        raise InputError(f"there is no {path}. Check the folder's name.")
    files.refuse_lfs_pointer(path)
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is refused: it needs unpickling of more than tensors, or is no checkpoint "
            f"({str(error).splitlines()[0]}). Ask for safetensors, or convert it where it was made."
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path} is not a plain state dict of tensors. Save model.state_dict() alone.")
    return {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}


def _filled(model: Crosscoder, tensors: Mapping[str, Tensor], source: Path) -> Crosscoder:
    """Return the model with these tensors, after checking names and shapes."""
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
