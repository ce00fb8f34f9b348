"""What a result was made with: versions, machine, commit."""

import importlib.metadata
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "transformer-lens", "sae-lens", "safetensors", "datasets",
    "numpy",
)  # fmt: skip


def environment(device: str | None = None) -> dict[str, Any]:
    """Return versions of Python, this toolkit and the packages that decide numbers; processor, threads, device."""
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("model-diffing", *PACKAGES):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    facts["cpu"] = cpu_name()
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()  # AVX2, AVX512, ...: ratios of speed depend on it
    facts["threads"] = torch.get_num_threads()
    facts["device"] = torch.cuda.get_device_name(device) if device and device.startswith("cuda") else "cpu"
    facts["git_commit"] = git_commit()
    return facts


def cpu_name() -> str:
    """Return the model of the processor; the architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the commit of this file's checkout, with `+changes` where it was edited; None outside one."""
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed.strip() else "")


def peak_memory_gib() -> float:
    """Return the largest memory that this process has held, GiB.

    Linux's `ru_maxrss` outlives exec, so that a child begins with the peak of its parent; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) / 1024**2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**3 if sys.platform == "darwin" else 1024**2)
