"""How much the resident memory of a fresh process grows over three training steps.

The growth is the peak over making model and optimiser and three steps, less what was resident after imports, data and
a tiny step; so it counts weights, gradients, Adam's moments and everything that a step allocates. Linux only, since
the kernel's high-water mark is reset through /proc/self/clear_refs.
`python -m benchmarks.throughput.memory NAME D_MODEL DICT_SIZE BATCH K [FOLDER]` prints it, in MiB.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.throughput import loading, steps
from benchmarks.throughput.adapters import UNIT_NORM
from benchmarks.throughput.steps import Shape, Step, planted
from benchmarks.timing import median_row

N_STEPS = 3
RESET = Path("/proc/self/clear_refs")


def resident(key: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def growth(name: str, shape: Shape, folder: Path | None = None) -> float:
    """Return the MiB by which this process grows, which should be a fresh one."""
    batches = planted(shape, N_STEPS)
    make = maker(name, folder)
    first = shape._replace(d_model=8, dict_size=32, batch=8, k=2)
    make(first)(planted(first, 1)[0])  # what the first step of a process imports and allocates once is not counted
    gc.collect()
    RESET.write_text("5")
    before = resident("VmRSS")
    step = make(shape)
    for x in batches:
        step(x)
    return resident("VmHWM") - before


def maker(name: str, folder: Path | None) -> Callable[[Shape], Step]:
    """Return what makes the step of `ours`, `dense` or a peer at a shape."""
    if name in ("ours", "dense"):
        make = steps.our_step if name == "ours" else steps.dense_step
        return lambda shape: make(steps.start_model(shape.config().crosscoder), shape.config())
    build = loading.load(name, folder)
    return lambda shape: build(steps.start_model(shape.config().crosscoder, UNIT_NORM), shape.k).step


def measure(name: str, shape: Shape, n_processes: int, folder: Path | None = None) -> list[float]:
    """Return the MiB of each of some fresh processes with one thread; none where the system is not Linux.

    Raises:
        RuntimeError: a process failed; its last line is quoted.
    """
    if not RESET.exists():
        return []
    command = [sys.executable, "-m", __name__, name, *(str(value) for value in shape[:4])]
    command += [str(folder)] if folder else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    growths = []
    for _ in range(n_processes):
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"measuring the memory of {name!r} failed: {last}")
        growths.append(float(process.stdout.split()[-1]))
    return growths


def rows(
    shape: Shape, names: Sequence[str], n_processes: int, checkouts: dict[str, Path] | None = None
) -> list[dict[str, Any]]:
    """Return the rows `throughput.step.<shape>[.<name>].peak_memory_growth`, each of processes of its own."""
    grown = {name: measure(name, shape, n_processes, (checkouts or {}).get(name)) for name in names}
    return [
        median_row(f"throughput.step.{shape}{'' if name == 'ours' else f'.{name}'}.peak_memory_growth", values, "MiB")
        for name, values in grown.items()
        if values
    ]


if __name__ == "__main__":
    name, *sizes = sys.argv[1:6]
    print(growth(name, Shape(*map(int, sizes)), Path(sys.argv[6]) if len(sys.argv) > 6 else None))
