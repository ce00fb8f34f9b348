"""Gemma Scope's `params.npz`: checked by its headers, then read without unpickling.

`read_shapes` inflates nothing but the headers of the arrays; `read_arrays` reads them after they were found sound. An
archive that declares more than it holds, or inflates to far more than its size, is refused before memory is spent.
"""

import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.models import points
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, Sae
from sae_lora.dictionaries.places import chosen_hook_point

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
MAX_RATIO = 50
"""Largest inflated size for the size of the file: trained float32 weights deflate by less than 2, deflate itself stops
at 1,032."""
_MAX_MEMBERS = 100
_FREE_BYTES = 1 << 20  # small files may be mostly zeros
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
"""Where the releases of Gemma Scope sit, as SAELens has it."""


def inspect(path: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    path = _archive_of(path)
    shapes = read_shapes(path)
    # Published as <release>/layer_20/width_16k/average_l0_71/params.npz; in the hub's cache models--google-- precedes.
    where = path.absolute().as_posix()
    layer = re.search(r"/layer_(\d+)/width_\w+/", where)
    site = re.search(r"gemma-scope-\w+-\w+-(res|mlp|att|transcoders)(-canonical)?/", where)
    if site and site[1] == "transcoders":
        raise InputError(f"{str(path)!r} is a transcoder, which computes the MLP's output from its input; give an SAE.")
    named = f"blocks.{layer[1]}.{_SITES[site[1]]}" if layer and site else None
    settings = {"gate": "jumprelu", "apply_b_dec_to_input": False}
    chosen = chosen_hook_point(named, hook_point, path, model_type)
    if layer and points.layer_of(chosen) != int(layer[1]):
        raise InputError(f"{str(path)!r} is of layer {layer[1]}, not at {chosen!r}. Give a hook point of that layer.")
    return DictionaryInfo("gemma-scope", str(path), chosen, shapes.d_model, shapes.dict_size, settings)


def read(info: DictionaryInfo, path: Path) -> FrozenDictionary:
    """Read the weights of an inspected dictionary."""
    return Sae(info, read_arrays(_archive_of(path))).requires_grad_(False)


def _archive_of(path: Path) -> Path:
    return path / "params.npz" if path.is_dir() else path


class Shapes(NamedTuple):
    """What the headers say."""

    d_model: int
    dict_size: int
    dtype: str


def read_shapes(path: Path) -> Shapes:
    """Return the sizes of the dictionary in the archive, from the headers of its arrays.

    Raises:
        InputError: no such file, a git-lfs pointer, or arrays of other names, types or shapes than Gemma Scope's.
        CorruptData: no zip archive, or an array whose size is not what it declares.
    """
    with _archive(path) as archive:
        if len(archive.infolist()) > _MAX_MEMBERS:
            raise CorruptData(
                f"{path} holds {len(archive.infolist()):,} files; Gemma Scope's hold {len(NAMES)} arrays."
            )
        headers = {_canonical(info.filename): _header(archive, info, path) for info in archive.infolist()}
        inflated = sum(info.file_size for info in archive.infolist())
    missing = [name for name in NAMES if name not in headers]
    if missing:
        raise InputError(
            f"{path} has no array {missing[0]!r}; it holds {', '.join(sorted(headers)[:6]) or 'nothing'}. Expected "
            f"Gemma Scope's {', '.join(NAMES)}."
        )
    if inflated > _FREE_BYTES and inflated > MAX_RATIO * path.stat().st_size:
        raise CorruptData(
            f"{path} would inflate from {files.size_text(path.stat().st_size)} to {files.size_text(inflated)}, which "
            "no trained weights do. Download it again from its publisher."
        )
    (dict_size,), (d_model,) = _vector(headers, "b_enc", path), _vector(headers, "b_dec", path)
    expected = {"W_enc": (d_model, dict_size), "W_dec": (dict_size, d_model), "threshold": (dict_size,)}
    for name, shape in expected.items():
        if headers[name][0] != shape:
            transposed = " It is transposed." if headers[name][0] == shape[::-1] and len(shape) == 2 else ""
            raise InputError(
                f"{path}: {name!r} has shape {headers[name][0]}, expected {shape} from its biases.{transposed} Use the "
                "file as published."
            )
    return Shapes(d_model, dict_size, str(headers["W_enc"][1]))


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the five tensors in float32. Call `read_shapes` first.

    Raises:
        CorruptData: bytes that do not inflate to what was declared, or are not finite.
    """
    tensors = {}
    with _archive(path) as archive:
        for info in archive.infolist():
            name = _canonical(info.filename)
            if name not in NAMES:
                continue
            try:
                with archive.open(info) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
            except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
                raise CorruptData(f"{path}: {name!r} is damaged ({error}). Download it again.") from None
            if not np.isfinite(array).all():
                raise CorruptData(f"{path}: {name!r} holds numbers that are not finite. Download it again.")
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return tensors


def _archive(path: Path) -> zipfile.ZipFile:
    files.refuse_lfs_pointer(path)
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise CorruptData(f"{path} is no .npz archive, or was cut off. Download it again.") from None


def _canonical(filename: str) -> str:
    """Return a name in its one spelling: published files say W_enc or w_enc."""
    name = filename.removesuffix(".npy")
    return f"W_{name[2:]}" if name.startswith("w_") else name


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    try:
        with archive.open(info) as file:
            shape, dtype, n_bytes = _npy_header(file)
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError) as error:
        raise CorruptData(f"{path}: {info.filename!r} is no array ({error}). Download it again.") from None
    if dtype.kind != "f":
        raise InputError(f"{path}: {info.filename!r} holds {dtype}, not floating-point numbers; it is not read.")
    if n_bytes != info.file_size:
        raise CorruptData(
            f"{path}: {info.filename!r} declares {n_bytes:,} bytes but {info.file_size:,} are stored. "
            "Download it again."
        )
    return shape, dtype


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return the shape, type and bytes of the whole member by its own header."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype, file.tell() + math.prod(shape) * dtype.itemsize


def _vector(headers: dict[str, tuple[tuple[int, ...], np.dtype]], name: str, path: Path) -> tuple[int]:
    shape = headers[name][0]
    if len(shape) != 1:
        raise InputError(f"{path}: {name!r} has shape {shape}, expected one axis. Use the file as published.")
    return (shape[0],)
