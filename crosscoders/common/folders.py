"""Where a cache lies: a local folder, or any URL that fsspec knows (s3://, gs://, file://, memory://).

`open_folder` tells them apart. Both publish whole files only. A remote file is written to a local temporary folder,
uploaded, and read back for size and checksum before anything refers to it; reading downloads and checks it first.
Nothing locks a remote folder against a second writer.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, EnvironmentFault, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoders.common.records import Record

T = TypeVar("T")


class Folder:
    """A local folder."""

    def __init__(self, path: str | Path) -> None:
        self.path: str | Path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file in it; empty where there is no such folder."""
        path = Path(self.path)
        return {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()} if path.is_dir() else {}

    def subfolders(self) -> list[str]:
        """Return the names of the folders in it."""
        path = Path(self.path)
        return sorted(inner.name for inner in path.iterdir() if inner.is_dir()) if path.is_dir() else []

    def adopt(self, other: "Folder", name: str, expected: files.Written) -> None:
        """Take a file of another folder of the same kind, without reading it where the disk allows that."""
        if isinstance(other, RemoteFolder):
            raise InputError(f"{other} is remote and {self} is not. Put both on one side.")
        files.link_or_copy(Path(other.path) / name, Path(self.path) / name, expected)

    def read_model(self, name: str, model: type["Record"]) -> dict[str, Any]:
        """Read a JSON file of ours in it, as `files.read_model`."""
        return files.read_model(Path(self.path) / name, model)

    def read_tensors(self, name: str, expected: files.Written) -> dict[str, "Tensor"]:
        """Read a file of tensors in it, as `files.read_tensors`."""
        return files.read_tensors(Path(self.path) / name, expected)

    def write_json(self, name: str, value: Any) -> None:
        """Write plain data into it, as `files.write_json`."""
        files.write_json(Path(self.path) / name, value)

    def write_tensors(self, name: str, tensors: dict[str, "Tensor"]) -> files.Written:
        """Write tensors into it, as `files.write_tensors`."""
        return files.write_tensors(Path(self.path) / name, tensors)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (Path(self.path) / name).unlink(missing_ok=True)

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the folder as its only writer, as `files.exclusive`."""
        return files.exclusive(Path(self.path))

    def require_space(self, n_bytes: int, shard_bytes: int, mend: str) -> None:
        """Raise EnvironmentFault when the whole does not fit."""
        files.require_free_space(Path(self.path), n_bytes, mend)


class RemoteFolder(Folder):
    """A folder behind a URL.

    Raises:
        InputError: fsspec knows no such protocol.
        EnvironmentFault: the package of the protocol is not installed, or the other side fails.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        protocol = url.split("://")[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except ImportError:
            package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}.get(protocol)
            raise EnvironmentFault(
                f"{url} needs the fsspec package for {protocol}://. Run: pip install {package or f'fsspec[{protocol}]'}"
            ) from None
        except ValueError:
            raise InputError(f"{url} has the protocol {protocol!r}, which fsspec does not know. Use s3, gs.") from None
        self.path = url.rstrip("/")

    def _call(self, what: str, act: Callable[[], T], *, if_missing: T | None = None) -> T:
        """Run `act`; failures of the other side, of whatever class its package uses, are raised as one line."""
        try:
            return act()
        except Exception as error:
            if isinstance(error, FileNotFoundError) and if_missing is not None:
                return if_missing
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EnvironmentFault(
                f"{what} failed: {cause}. Finished shards are kept. "
                "Check the network and the rights, and run the same command again; it goes on where it stopped."
            ) from error

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _list(self, kind: str) -> dict[str, int]:
        def listed() -> dict[str, int]:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._root, detail=True)
            return {e["name"].rsplit("/", 1)[-1]: int(e["size"] or 0) for e in entries if e["type"] == kind}

        return self._call(f"listing {self}", listed, if_missing={})

    def sizes(self) -> dict[str, int]:
        return self._list("file")

    def subfolders(self) -> list[str]:
        return sorted(self._list("directory"))

    def adopt(self, other: Folder, name: str, expected: files.Written) -> None:
        if not isinstance(other, RemoteFolder) or type(other._fs) is not type(self._fs):
            raise InputError(f"{other} and {self} are of different kinds. Put both on one side.")
        source = other._at(name)
        self._call(f"copy of {other}/{name} to {self}", lambda: self._fs.cp_file(source, self._at(name)))

    def read_model(self, name: str, model: type["Record"]) -> dict[str, Any]:
        data = self._call(f"reading {self}/{name}", lambda: self._fs.cat_file(self._at(name)))
        return model.checked(data, f"{self}/{name}")

    def read_tensors(self, name: str, expected: files.Written) -> dict[str, "Tensor"]:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            self._call(f"download of {self}/{name}", lambda: self._fs.get_file(self._at(name), str(local)))
            if files.written(local) != expected:
                raise CorruptData(f"{self}/{name} does not match its checksum. Upload it again, or cache again.")
            return files.read_tensors(local)

    def write_json(self, name: str, value: Any) -> None:
        with self._staged(name) as local:
            files.write_json(local, value)

    def write_tensors(self, name: str, tensors: dict[str, "Tensor"]) -> files.Written:
        with self._staged(name) as local:
            written = files.write_tensors(local, tensors)
        return written

    @contextlib.contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        """Yield a local file that is uploaded and read back at the end."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            yield local
            back = Path(folder) / "back"

            def upload() -> None:
                self._fs.makedirs(self._root, exist_ok=True)
                self._fs.put_file(str(local), self._at(name))
                self._fs.get_file(self._at(name), str(back))

            self._call(f"upload of {self}/{name}", upload)
            if files.written(back) != files.written(local):
                raise EnvironmentFault(
                    f"upload of {self}/{name} failed: what was read back differs. Finished shards are kept. "
                    "Run the same command again; it goes on where it stopped."
                )

    def remove(self, name: str) -> None:
        if name in self.sizes():
            self._call(f"removing {self}/{name}", lambda: self._fs.rm_file(self._at(name)))

    def exclusive(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def require_space(self, n_bytes: int, shard_bytes: int, mend: str) -> None:
        staging = 2 * min(shard_bytes, n_bytes)  # a shard, and what is read back of it
        files.require_free_space(Path(tempfile.gettempdir()), staging, "Set TMPDIR to a folder with space.")


def open_folder(path: str | Path) -> Folder:
    """Return the folder at a local path or a URL."""
    return RemoteFolder(path) if isinstance(path, str) and "://" in path else Folder(path)
