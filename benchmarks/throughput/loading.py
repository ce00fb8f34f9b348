"""Import other toolkits, from a checkout where one is given, and leave PyTorch and the loaded modules as they were."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.throughput.adapters import PEERS, Build, Known, Peer, foreign_import
from crosscoders import Crosscoder
from crosscoders.common.errors import EnvironmentFault, InputError, nearest


def load(name: str, folder: Path | None = None) -> Build:
    """Import a peer, from a checkout where one is given, and leave PyTorch as it was.

    Raises:
        InputError: the checkout does not hold the package.
        EnvironmentFault: the package, or one that it needs, is not installed.
    """
    known = PEERS[name]
    with foreign_import(), packages_of(name, known, folder):
        try:
            importlib.import_module(known.package)
        except ImportError as error:
            mend = f"pip install {known.pip}" if known.pip and not folder else f"install what {folder} needs"
            raise EnvironmentFault(f"{name} cannot be imported: {error}. Do: {mend}") from error
    return lambda weights, k: _build(name, known, folder, weights, k)


def _build(name: str, known: Known, folder: Path | None, weights: Crosscoder, k: int) -> Peer:
    with foreign_import(), packages_of(name, known, folder):
        return known.build(weights, k)


@contextlib.contextmanager
def packages_of(name: str, known: Known, folder: Path | None) -> Iterator[None]:
    """Import the package from the folder meanwhile; the one of the same name that was loaded comes back after."""
    if folder is None:
        yield
        return
    roots = [root for root in (folder, folder / "src") if (root / known.package / "__init__.py").is_file()]
    if not roots:
        raise InputError(
            f"--checkout {name}={folder}: there is no package {known.package!r} in it or in its src/. "
            f"Give the folder that the repository was cloned into."
        )

    def ours() -> list[str]:
        return [key for key in sys.modules if key.split(".")[0] == known.package]

    previous = {key: sys.modules.pop(key) for key in ours()}
    sys.path.insert(0, str(roots[0]))
    try:
        yield
    finally:
        sys.path.remove(str(roots[0]))
        for key in ours():
            del sys.modules[key]
        sys.modules.update(previous)


def read_checkouts(pairs: list[str]) -> dict[str, Path]:
    """Read the NAME=FOLDER pairs of the command line.

    Raises:
        InputError: not such a pair, an unknown name, no such folder.
    """
    folders = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals:
            raise InputError(f"--checkout {pair!r} is not NAME=FOLDER. Names: {', '.join(PEERS)}.")
        if name not in PEERS:
            raise InputError(
                f"--checkout: unknown name {name!r}{nearest(name, list(PEERS))} Names: {', '.join(PEERS)}."
            )
        if not Path(folder).is_dir():
            raise InputError(f"--checkout {name}: {folder} is not a folder. Clone the repository there.")
        folders[name] = Path(folder).resolve()
    return folders
