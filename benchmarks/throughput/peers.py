"""Our training step against those of other toolkits, on the same tensors in one interleaved loop.

`rows` loads each toolkit, checks what it computes, then times it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.throughput import equality, memory
from benchmarks.throughput.adapters import PEERS, UNIT_NORM, Build
from benchmarks.throughput.loading import fault, load
from benchmarks.throughput.steps import SHAPES, Shape, encoder_product, our_step, planted, rate_row, start_model, turns
from benchmarks.timing import interleaved, ratio_row
from crosscoders.common.errors import EnvironmentFault, InputError
from crosscoders.common.progress import say

CHECK_SHAPE = Shape(24, 160, 40, 6)
"""Where an adapter is held to its claims: all sizes different, no multiple of another but the last."""


class Measured(NamedTuple):
    """Rows, and the peers that have none."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    """Name -> why."""


def rows(quick: bool, checkouts: dict[str, Path], installed: bool) -> Measured:
    """Return the rows `throughput.step.<shape>.ratio_to_<peer>` and of each peer by itself.

    With `installed`, every toolkit that pip can install takes part; one that is not there, or that does not compute
    what its adapter says, is left out with the reason.

    Raises:
        InputError: a checkout that was asked for does not hold the package.
        EnvironmentFault: checkouts that were asked for lack something; one line each, before anything is timed.
    """
    installable = [name for name, known in PEERS.items() if installed and known.pip and name not in checkouts]
    builds: dict[str, Build] = {}
    left_out: dict[str, str] = {}
    lacking = []
    for name in [*checkouts, *installable]:
        try:
            builds[name] = checked(name, checkouts.get(name))
        except (EnvironmentFault, equality.Unequal) as error:
            if name in checkouts and isinstance(error, EnvironmentFault):
                lacking.append(str(error))
                continue
            left_out[name] = str(error)
            say(f"{name} is left out: {error}")
    if lacking:
        raise EnvironmentFault("\n".join(lacking))
    measured = []
    if builds:
        for shape in SHAPES[: 1 if quick else None]:
            measured += time_rows(shape, builds, n_rounds=3 if quick else 9)
            measured += memory.rows(shape, list(builds), 1 if quick else 3, checkouts)
    return Measured(measured, left_out)


def checked(name: str, folder: Path | None) -> Build:
    """Load a peer and hold it to what its adapter says.

    Raises:
        InputError: the checkout does not hold the package.
        EnvironmentFault: it lacks something that its adapter uses.
        Unequal: it computes something else.
    """
    try:
        build = load(name, folder)
        equality.check(name, PEERS[name], build, CHECK_SHAPE)
    except (InputError, EnvironmentFault, equality.Unequal):
        raise
    except Exception as error:  # whatever others' code raises when it is not what the adapter was written for
        raise fault(name, folder, error) from error
    return build


def time_rows(shape: Shape, builds: dict[str, Build], *, n_rounds: int) -> list[dict[str, Any]]:
    """Time ours, the encoder's product and all peers in turn, from weights that all of them can hold."""
    name, config, batches = f"throughput.step.{shape}", shape.config(), planted(shape)
    model = start_model(config.crosscoder, UNIT_NORM)
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: encoder_product(model, batches[0]),
        "ours": turns(our_step(model, config), batches),
    }
    for peer, build in builds.items():
        parts[peer] = turns(build(start_model(config.crosscoder, UNIT_NORM), shape.k).step, batches)
    seconds = interleaved(parts, n_rounds=n_rounds)
    measured = []
    for peer in builds:
        note = PEERS[peer].note
        measured += [
            ratio_row(f"{name}.ratio_to_{peer}", seconds["ours"], seconds[peer], f"steps of {peer}", note),
            ratio_row(f"{name}.{peer}.ratio_to_encode", seconds[peer], seconds["encode"], "encoder products"),
            rate_row(f"{name}.{peer}", shape, seconds[peer]),
        ]
    return measured
