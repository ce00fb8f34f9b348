"""Shapes of the tensors in a file, by its header alone, and whether they are those that its settings declare."""

from pathlib import Path

import torch
from torch import Tensor

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.formats.weights import read_weights

Shape = tuple[int, ...]


def shapes_of(path: Path) -> dict[str, Shape]:
    """Return the shapes of all tensors of a safetensors file, or of a plain state dict that torch wrote.

    Raises:
        InputError: no such file, a git-lfs pointer, or a pickle that holds more than tensors.
        CorruptData: no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}. Download or save the dictionary again.")
    files.refuse_lfs_pointer(path)
    if path.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in read_weights(path, device="meta").items()}
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptData(f"{path} is not a safetensors file ({error}). Download or make it again.") from None


def require_shapes(path: Path, shapes: dict[str, Shape], expected: dict[str, Shape], by: str) -> None:
    """Raise InputError where a tensor is missing or has another shape than `by`, such as "its cfg.json", declares."""
    for name, shape in expected.items():
        if shapes.get(name) == shape:
            continue
        transposed = " It is transposed." if len(shape) == 2 and shapes.get(name) == shape[::-1] else ""
        raise InputError(
            f"{path}: {name!r} has shape {shapes.get(name)}, expected {shape} from {by}.{transposed} Use the files as "
            "published."
        )


def vector_length(path: Path, shapes: dict[str, Shape], name: str) -> int:
    """Return the length of a bias, which decides the others' shapes.

    Raises:
        InputError: it is not there, or has another number of axes.
    """
    shape = shapes.get(name)
    if shape is None or len(shape) != 1:
        there = ", ".join(sorted(shapes)[:6]) or "nothing"
        raise InputError(f"{path} has no vector {name!r}; it holds {there}. Use the files as published.")
    return shape[0]


def float_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, numbers in float32, which have to be finite.

    Raises:
        InputError: as `shapes_of`.
        CorruptData: as `shapes_of`; numbers that are not finite.
    """
    tensors = read_weights(path)
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise CorruptData(f"{path}: {name!r} holds numbers that are not finite. Download it again.")
    return {name: value.float().contiguous() for name, value in tensors.items()}
