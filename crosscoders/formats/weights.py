"""Tensors of a weights file, and a crosscoder filled with them; never unpickles code."""

import zipfile
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
        CorruptData: a part of its archive is not what was written, or a tensor is larger than its file.
    """
    if path.suffix == ".safetensors":
        return files.read_tensors(path)
    if not path.is_file():
        raise InputError(f"there is no {path}. Check the folder's name.")
    files.refuse_lfs_pointer(path)
    _require_whole_archive(path)
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # what a damaged pickle raises is as it may be
        raise InputError(
            f"{path} is refused: it needs unpickling of more than tensors, or is damaged. Ask for safetensors, convert "
            "it where it was made, or download it again."
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path} is not a plain state dict of tensors. Save model.state_dict() alone.")
    for name, value in tensors.items():
        if value.nbytes > path.stat().st_size:  # strides can make any number of one
            raise CorruptData(
                f"{path}: {name!r} would take {files.size_text(value.nbytes)} of a file of "
                f"{files.size_text(path.stat().st_size)}. Save it contiguous, or download it again."
            )
    return {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}


def _require_whole_archive(path: Path) -> None:
    """Raise CorruptData for an archive that is cut, or in which a bit has changed; torch.load does not look at the
    checksums in it."""
    if path.stat().st_size == 0:
        raise CorruptData(f"{path} is empty. Download it again.")
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return  # torch's form before version 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CorruptData(f"{path} is compressed, which torch.save does not do. Download it again.")
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        if isinstance(error, CorruptData):
            raise
        broken = str(error)
    if broken:
        raise CorruptData(f"{path} is damaged: its archive is not whole ({broken}). Download it again.")


def _filled(model: Crosscoder, tensors: dict[str, Tensor], source: Path) -> Crosscoder:
    """Return the model with these tensors, after checking names and shapes; `tensors` is empty of them afterwards."""
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in tensors:
            raise CorruptData(f"{source} has no tensor {name!r}. Download or save the crosscoder again.")
        if tensors[name].shape != value.shape:
            raise CorruptData(
                f"{source}: {name!r} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}."
            )
        # Not isfinite of the tensor, which would make copies of it.
        if name != "threshold" and not torch.stack(torch.aminmax(tensors[name].detach())).isfinite().all():
            raise CorruptData(f"{source}: {name!r} holds numbers that are not finite. Download or train it again.")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(tensors.pop(name))  # and frees it, so that not all weights are there twice
    return model.requires_grad_(False)
