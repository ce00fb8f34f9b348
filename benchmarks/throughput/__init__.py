"""Speed of training steps, caching, reads and Latent Scaling, as ratios measured in one run.

Everything that is compared runs in turn in one loop, and what it computes is compared first. CPU time of the process;
set OMP_NUM_THREADS=1 where other work shares the cores. Definitions: docs/performance.md.
"""

from typing import Any

from crosscoders.common.errors import InputError, nearest

PARTS = ("steps", "cache", "read", "scaling", "growth", "gpu", "peers")
DEFAULT = PARTS[:-1]


def run(quick: bool, only: tuple[str, ...] = (), peers: bool = False, checkout: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure the rows `throughput.*` of the parts in `only`, or of all but the peers.

    In the result, `left_out` says which peers have none.

    Args:
        quick: fewer rounds, small shapes only.
        only: some of PARTS.
        peers: also the toolkits that pip installs.
        checkout: also these, NAME=FOLDER.

    Raises:
        InputError: no such part or checkout.
        EnvironmentFault: a checkout needs a package that is not installed.
    """
    from benchmarks.throughput import caching, gpu, growth, loading, ours, reading, scaling
    from benchmarks.throughput import peers as others
    from crosscoders.common.memory import keep_large_blocks

    keep_large_blocks()  # as `crosscoders train` does; the peers and the floor have it too
    for part in only:
        if part not in PARTS:
            raise InputError(f"--only: unknown part {part!r}{nearest(part, list(PARTS))} Parts: {', '.join(PARTS)}.")
    folders = loading.read_checkouts(list(checkout))
    chosen = {*(only or DEFAULT), *(("peers",) if peers else ())}
    rows: list[dict[str, Any]] = []
    measured = others.rows(quick, folders, installed="peers" in chosen)
    homes = {"steps": ours, "cache": caching, "read": reading, "scaling": scaling, "growth": growth, "gpu": gpu}
    for part in homes:
        if part in chosen:
            rows += homes[part].rows(quick)
    return {"name": "throughput", "rows": rows + measured.rows, "left_out": measured.left_out}
