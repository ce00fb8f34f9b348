"""Our training step against those of other toolkits, on the same tensors in one interleaved loop.

`load` imports a toolkit, from a checkout where one is given; `rows` checks what it computes, then times it.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.throughput import equality, memory
from benchmarks.throughput.adapters import PEERS, UNIT_NORM, Build, Known, Peer, foreign_import
from benchmarks.throughput.steps import SHAPES, Shape, encoder_product, our_step, planted, rate_row, start_model, turns
from benchmarks.timing import interleaved, median_row, ratio_row
from crosscoders import Crosscoder
from crosscoders.common.errors import EnvironmentFault, InputError, nearest
from crosscoders.common.progress import say

CHECK_SHAPE = Shape(24, 160, 40, 6)
"""Where an adapter is held to its claims: all sizes different, no multiple of another but the last."""


class Measured(NamedTuple):
    """Rows, and the peers that have none."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    """Name -> why."""


def rows(quick: bool, checkouts: dict[str, Path], installed: bool) -> Measured:
    """Rows `throughput.step.<shape>.ratio_to_<peer>` and of each peer by itself.

    With `installed`, every toolkit that pip can install takes part; one that is not there, or that does not compute
    what its adapter says, is left out with the reason.

    Raises:
        InputError, EnvironmentFault: a checkout that was asked for cannot be imported.
    """
    wanted = [name for name, known in PEERS.items() if installed and known.pip and name not in checkouts]
    builds: dict[str, Build] = {}
    left_out: dict[str, str] = {}
    for name in [*checkouts, *wanted]:
        try:
            build = load(name, checkouts.get(name))
            equality.check(name, PEERS[name], build, CHECK_SHAPE)
            builds[name] = build
        except (EnvironmentFault, equality.Unequal) as error:
            if name in checkouts and isinstance(error, EnvironmentFault):
                raise
            left_out[name] = str(error)
            say(f"{name} is left out: {error}")
    found = []
    if builds:
        for shape in SHAPES[: 1 if quick else None]:
            found += time_rows(shape, builds, n_rounds=3 if quick else 9)
            found += memory_rows(shape, builds, checkouts, n_processes=1 if quick else 3)
    return Measured(found, left_out)


def time_rows(shape: Shape, builds: dict[str, Build], *, n_rounds: int) -> list[dict[str, Any]]:
    """Ours, the encoder's product and all peers in turn, from weights that all of them can hold."""
    name, config, batches = f"throughput.step.{shape}", shape.config(), planted(shape)
    model = start_model(config.crosscoder, UNIT_NORM)
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: encoder_product(model, batches[0]),
        "ours": turns(our_step(model, config), batches),
    }
    for peer, build in builds.items():
        parts[peer] = turns(build(start_model(config.crosscoder, UNIT_NORM), shape.k).step, batches)
    seconds = interleaved(parts, n_rounds=n_rounds)
    found = []
    for peer in builds:
        note = PEERS[peer].note
        found += [
            ratio_row(f"{name}.ratio_to_{peer}", seconds["ours"], seconds[peer], f"steps of {peer}", note),
            ratio_row(f"{name}.{peer}.ratio_to_encode", seconds[peer], seconds["encode"], "encoder products"),
            rate_row(f"{name}.{peer}", shape, seconds[peer]),
        ]
    return found


def memory_rows(
    shape: Shape, builds: dict[str, Build], checkouts: dict[str, Path], *, n_processes: int
) -> list[dict[str, Any]]:
    """Growth of resident memory over three steps, each peer in processes of its own."""
    grown = {peer: memory.measure(peer, shape, n_processes, checkouts.get(peer)) for peer in builds}
    name = f"throughput.step.{shape}"
    return [median_row(f"{name}.{peer}.peak_memory_growth", found, "MiB") for peer, found in grown.items() if found]


# ---------------------------------------------------------------------------------------------------------- loading


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
    """Imports of the package come from the folder; the package of the same name that was loaded comes back after."""
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


def read_checkouts(given: list[str]) -> dict[str, Path]:
    """NAME=FOLDER pairs of the command line.

    Raises:
        InputError: not such a pair, an unknown name, no such folder.
    """
    found = {}
    for pair in given:
        name, equals, folder = pair.partition("=")
        if not equals:
            raise InputError(f"--checkout {pair!r} is not NAME=FOLDER. Names: {', '.join(PEERS)}.")
        if name not in PEERS:
            raise InputError(
                f"--checkout: unknown name {name!r}{nearest(name, list(PEERS))} Names: {', '.join(PEERS)}."
            )
        if not Path(folder).is_dir():
            raise InputError(f"--checkout {name}: {folder} is not a folder. Clone the repository there.")
        found[name] = Path(folder).resolve()
    return found
