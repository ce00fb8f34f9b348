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
        EnvironmentFault: the package, or one that it needs, is not installed; or another one than the checkout's is.
    """
    known = PEERS[name]
    with foreign_import(), packages_of(name, known, folder):
        try:
            module = importlib.import_module(known.package)
        except ImportError as error:
            raise fault(name, folder, error) from error
        if folder and not Path(origin := next(iter(module.__path__))).resolve().is_relative_to(folder.resolve()):
            raise EnvironmentFault(f"{label(name, folder)}: {known.package!r} is imported from {origin}. Uninstall it.")
    return lambda weights, k: _build(name, known, folder, weights, k)


def label(name: str, folder: Path | None) -> str:
    """Return a peer as the command line names it."""
    return f"--checkout {name}={folder}" if folder else name


def fault(name: str, folder: Path | None, error: Exception) -> EnvironmentFault:
    """Return one line on what a peer lacks: a package, or a class, function, parameter or argument for its adapter."""
    known = PEERS[name]
    words = (str(error).splitlines() or [""])[0].rstrip(".")
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(f"{known.package}."):
        mend = f"install what {folder} needs" if folder else f"pip install {known.pip}"
        return EnvironmentFault(f"{label(name, folder)} cannot be imported: {words}. Do: {mend}")
    kind = "" if isinstance(error, ImportError | AttributeError | TypeError) else f"{type(error).__name__} "
    mend = "check out a version that has it; docs/performance.md names those that were tried"
    return EnvironmentFault(
        f"{label(name, folder)} lacks what its adapter uses: {kind}{words}. "
        f"Do: {mend if folder else f'pip install -U {known.pip}'}"
    )


def _build(name: str, known: Known, folder: Path | None, weights: Crosscoder, k: int) -> Peer:
    with foreign_import(), packages_of(name, known, folder):
        return known.build(weights, k)


@contextlib.contextmanager
def packages_of(name: str, known: Known, folder: Path | None) -> Iterator[None]:
    """Import the package from the folder meanwhile; the one of the same name that was loaded comes back after.

    A package is a folder that holds .py files; it may lack an __init__.py.
    """
    if folder is None:
        yield
        return
    roots = [root for root in (folder, folder / "src") if any((root / known.package).rglob("*.py"))]
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
