"""`diffing doctor`, as a function of its settings that returns a JSON object.

Nearly all of its time is the import of torch, which every command that computes needs too.
"""

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from crosscoders.common.checks import to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.files import size_text
from crosscoders.common.provenance import cpu_name
from crosscoders.common.results import result, row
from diffing.doctor.settings import DoctorSettings

PACKAGES = ("transformers", "transformer-lens", "sae-lens", "peft")
SIZES = {
    "Gemma 3 270M": 0.27e9, "Qwen 2.5 0.5B": 0.49e9, "Llama 3.2 1B": 1.24e9, "Gemma 2 2B": 2.61e9,
    "Llama 3.1 8B": 8.03e9, "Gemma 2 9B": 9.24e9, "Gemma 2 27B": 27.2e9,
}  # fmt: skip
"""Weights of models that come in pairs."""
BESIDE = 1 << 31
"""Bytes that batches and a small crosscoder take beside the models."""


def doctor(settings: DoctorSettings) -> dict[str, Any]:
    """Run `diffing doctor`."""
    if not Path(settings.folder).is_dir():
        raise InputError(f"folder {settings.folder!r} is not there. Name one whose disk is to be looked at.")
    started = time.perf_counter()
    import torch

    from crosscoders.common.devices import has_fast_bfloat16
    from crosscoders.common.memory import Room, gpu_room, ram_room

    seconds = time.perf_counter() - started
    n_gpus = torch.cuda.device_count()
    rooms = {"memory": ram_room()} | {f"memory on cuda:{i}": gpu_room(torch.device("cuda", i)) for i in range(n_gpus)}
    rooms["disk"] = Room(*reversed(shutil.disk_usage(settings.folder)[::2]))
    place = (
        f"memory on cuda:{max(range(n_gpus), key=lambda i: rooms[f'memory on cuda:{i}'].free)}" if n_gpus else "memory"
    )
    fitting = pairs_that_fit(rooms[place].free, 2 if n_gpus else 4)
    bfloat16 = "bfloat16" if has_fast_bfloat16() else "bfloat16 only emulated"
    gpus = [torch.cuda.get_device_name(i) for i in range(n_gpus)]
    lines = {
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in ("model-diffing", "torch", *PACKAGES)),
        "processor": f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {bfloat16}",
        "GPU": ", ".join(gpus) or f"none that torch {torch.__version__} sees; models run on the processor",
        **{name: f"{size_text(room.free)} free of {size_text(room.total)}" for name, room in rooms.items()},
        "hub": hub_line(),
        "pairs": f"both models at once: {', '.join(fitting)}" if fitting else "no pair beyond the embedded one",
        "first": "diffing demo, the embedded pair: minutes on a processor, 1 GB of memory",
        "time": f"{seconds:.1f} s of {time.perf_counter() - started:.1f} s were the import of torch",
    }
    rows = [
        row(f"doctor.{name.replace(' ', '_')}.{part}", getattr(room, part), "bytes", 1)
        for name, room in rooms.items()
        for part in ("free", "total")
    ]
    text = "\n".join(f"{name + ':':<18}{line}" for name, line in lines.items())
    return result("doctor", to_dict(settings), rows) | {"machine": lines, "pairs": fitting, "text": text}


def pairs_that_fit(n_bytes: int, bytes_per_weight: int) -> list[str]:
    """Return the models of which two fit into a memory, with `BESIDE`."""
    return [name for name, weights in SIZES.items() if 2 * weights * bytes_per_weight + BESIDE <= n_bytes]


def hub_line() -> str:
    """Say whether the hub can be logged in to, and where its files are kept; asks nobody."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    token = "a token is there" if huggingface_hub.get_token() else "no token: public models only (`hf auth login`)"
    return f"{token}; files in {HF_HUB_CACHE}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
