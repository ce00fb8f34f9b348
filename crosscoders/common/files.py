"""Every byte that is written goes through here: whole files only, checksums, one writer, manifest last.

Reading order: `write_bytes` publishes one file (temporary file, fsync, rename, fsync of the folder), `write_json` and
`write_tensors` use it, `read_model` and `read_tensors` check what they read, `exclusive` holds a folder against a
second writer, `require_free_space` refuses a plan that cannot fit.
"""

import contextlib
import errno
import json
import mmap
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crosscoders.common.errors import CorruptData, EnvironmentFault, InputError
from crosscoders.common.seals import checksum, sealed

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoders.common.records import Record

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_HEADER_BYTES = 10_000_000  # a safetensors header of 500,000 empty tensors took 17 s to parse
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_TEMPORARY = re.compile(r"\..+\.tmp-\d+|\.tmp\w{6}")  # ours, and those that safetensors writes before ours
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Written(NamedTuple):
    """What identifies a published file."""

    n_bytes: int
    """Size of the file."""
    checksum: str
    """xxh3-128 of its bytes, hexadecimal; guards against accident, not against an attacker."""


def written(path: Path) -> Written:
    """Return the size and checksum of a file, read in blocks of 8 MiB."""
    import xxhash

    digest, n_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
            n_bytes += len(block)
    return Written(n_bytes, str(digest.hexdigest()))


def hash_file(path: Path) -> str:
    """Return sha256 of a file, read in blocks of 8 MiB."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return sha256 of the canonical JSON form of plain data."""
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_bytes(path: Path, data: bytes) -> Written:
    """Publish `data` at `path`: a reader sees the old file or the whole new one, never a part.

    Raises:
        EnvironmentFault: no space left, or the folder cannot be written.
    """
    with _published(path, len(data)) as temporary:
        temporary.write_bytes(data)
    return Written(len(data), checksum(data))


@contextlib.contextmanager
def _published(path: Path, n_bytes: int) -> Iterator[Path]:
    """Yield the name of a file to write, of about `n_bytes`; it takes its place at `path` once it is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in _FULL:
            free = shutil.disk_usage(path.parent).free
            if error.errno != errno.ENOSPC:  # a quota, or a limit on files
                raise EnvironmentFault(
                    f"no space left for {path} ({error.strerror}), though {size_text(free)} are free. Raise that "
                    "limit and run the same command again; it goes on where it stopped."
                ) from error
            raise EnvironmentFault(
                f"no space left for {path}: it needs {size_text(n_bytes)} and {size_text(free)} are free. "
                "Free some space and run the same command again; it goes on where it stopped."
            ) from error
        raise EnvironmentFault(f"cannot write {path}: {error.strerror}. Choose another folder.") from error


def link_or_copy(source: Path, path: Path, expected: Written) -> None:
    """Publish a finished file under a second name; it is copied and checked where the disk cannot link.

    Raises:
        EnvironmentFault: no space left, or the folder cannot be written.
        CorruptData: what was copied is not what was expected.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            if written(temporary) != expected:
                raise CorruptData(f"{source} does not match its checksum. Make its folder again.") from None
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {error.strerror}. Choose another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files of writers that were killed, from a folder that nobody else writes."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, *, foreign: bool = False) -> Written:
    """Publish plain data as strict JSON (no NaN), keys in the given order, an object with a checksum of its own.

    foreign: in a layout of others, whose readers may refuse an entry that they do not know, so without a checksum.
    """
    written = value if foreign else sealed(value)
    return write_bytes(path, (json.dumps(written, indent=1, allow_nan=False) + "\n").encode())


def read_model(path: Path, model: type["Record"]) -> dict[str, Any]:
    """Read a JSON file of ours of a given form; what is returned is plain data.

    Raises:
        InputError: there is no such file, or one of another format version.
        EnvironmentFault: it cannot be read.
        CorruptData: it is not JSON, or not of that form.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no {path}. Check the folder's name.") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}. Check its rights.") from error
    return model.checked(data, str(path))


def write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> Written:
    """Publish tensors as one safetensors file. Equal tensors give equal bytes; nothing is copied on the way."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with _published(path, sum(t.nbytes for t in whole.values())) as temporary:
        try:
            # One metadata key only: the library does not keep an order among several, and bytes must be reproducible.
            save_file(whole, temporary, {"format": "pt"})
        except SafetensorError as error:  # holds the system's error as text alone
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        result = written(temporary)
    return result


def read_tensors(path: Path, expected: Written | None = None) -> dict[str, "Tensor"]:
    """Read a safetensors file after checking size, checksum (where known) and header.

    Raises:
        InputError: there is no such file, or a git-lfs pointer stands in its place.
        CorruptData: size, checksum or header are wrong.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"there is no {path}. Check the folder's name.")
    refuse_lfs_pointer(path)
    n_bytes = path.stat().st_size
    if expected is not None and n_bytes != expected.n_bytes:
        raise CorruptData(
            f"{path} has {n_bytes} bytes but its manifest says {expected.n_bytes}. Make this folder again."
        )
    no_header = f"{path} is not a safetensors file: its header length is impossible. Download or make it again."
    if n_bytes < 8:
        raise CorruptData(no_header)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if expected is not None and checksum(data) != expected.checksum:
            raise CorruptData(
                f"{path} does not match its checksum: at least one bit has changed. Make this folder again."
            )
        if int.from_bytes(data[:8], "little") > min(MAX_HEADER_BYTES, n_bytes):
            raise CorruptData(no_header)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CorruptData(f"{path} is not a safetensors file ({error}). Download or make it again.") from None


def refuse_lfs_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{path} is a git-lfs pointer, not the file itself. Run: git lfs pull")


def require_free_space(folder: Path, n_bytes: int, mend: str) -> None:
    """Raise EnvironmentFault, before any work, when `n_bytes` do not fit on the disk of `folder`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if n_bytes > free:
        raise EnvironmentFault(f"{folder} needs {size_text(n_bytes)} but its disk has {size_text(free)} free. {mend}")


def size_text(n_bytes: float) -> str:
    """Return bytes in words, decimal units: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` as its only writer; the kernel drops the lock with the process, so a killed run leaves none.

    Raises:
        EnvironmentFault: another process writes there, or the folder cannot be written or locked.
    """
    from filelock import FileLock, Timeout

    path = folder / ".lock"
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a process that is killed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        owner = path.read_text(errors="replace").strip() or "another process"
        raise EnvironmentFault(
            f"{folder} is being written by {owner}. Wait for it, or choose another folder."
        ) from None
    except OSError as error:
        cause = "its file system has no locks" if error.errno in _NO_LOCKS else error.strerror
        raise EnvironmentFault(f"cannot write to {folder}: {cause}. Choose another folder.") from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        remove_temporary(folder)
        yield
    finally:
        lock.release()
