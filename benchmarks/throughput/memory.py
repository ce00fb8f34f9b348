"""How much the resident memory of a fresh process grows over three training steps.

The growth is the peak over making model and optimiser and three steps, less what was resident after imports and data;
so it counts weights, gradients and Adam's moments once, and everything that a step allocates. Linux only: the kernel's
high-water mark is reset through /proc/self/clear_refs.
`python -m benchmarks.throughput.memory NAME D_MODEL DICT_SIZE BATCH K [FOLDER]` prints it, in MiB.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.throughput.steps import Shape

N_STEPS = 3


def resident(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def growth(name: str, shape: "Shape", folder: Path | None = None) -> float:
    """In this process, which should be a fresh one."""
    from benchmarks.throughput import adapters, peers, steps

    batches = steps.planted(shape, N_STEPS)
    config = shape.config()
    known = None if name in ("ours", "dense") else peers.load(name, folder)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the first product allocates the library's buffers
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    if known:
        step = known(steps.start_model(config.crosscoder, adapters.UNIT_NORM), shape.k).step
    else:
        make = steps.our_step if name == "ours" else steps.dense_step
        step = make(steps.start_model(config.crosscoder), config)
    for x in batches:
        step(x)
    return resident("VmHWM") - before


def measure(name: str, shape: "Shape", n_processes: int, folder: Path | None = None) -> list[float]:
    """MiB of each of some fresh processes with one thread.

    Raises:
        RuntimeError: a process failed; its last line is quoted.
    """
    command = [sys.executable, "-m", __name__, name, *(str(value) for value in shape[:4])]
    command += [str(folder)] if folder else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = []
    for _ in range(n_processes):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"measuring the memory of {name!r} failed: {last}")
        found.append(float(done.stdout.split()[-1]))
    return found


if __name__ == "__main__":
    from benchmarks.throughput.steps import Shape

    name, *sizes = sys.argv[1:6]
    print(growth(name, Shape(*map(int, sizes)), Path(sys.argv[6]) if len(sys.argv) > 6 else None))
