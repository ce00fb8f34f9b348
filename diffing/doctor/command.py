"""`diffing doctor`, as a function of its settings that returns a JSON object.

Nothing heavy is imported: versions are those of the installed packages, GPUs those that nvidia-smi lists, and what the
processor can is what /proc says, so the answer is there at once.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.checks import to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.files import size_text
from crosscoders.common.provenance import cpu_name
from crosscoders.common.results import row
from crosscoders.common.room import Room, ram_room
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
    gpus = list_gpus()
    rooms = {"memory": ram_room()} | {f"memory on cuda:{i}": gpu.room for i, gpu in enumerate(gpus)}
    rooms["disk"] = Room(*reversed(shutil.disk_usage(settings.folder)[::2]))
    free = max((gpu.room.free for gpu in gpus), default=rooms["memory"].free)
    fitting = pairs_that_fit(free, 2 if gpus else 4)
    lines = {
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "packages": ", ".join(f"{name} {version_of(name)}" for name in ("model-diffing", "torch", *PACKAGES)),
        "processor": f"{cpu_name()}, {os.cpu_count()} cores, {instructions()}",
        "GPU": gpu_line(gpus),
        **{name: f"{size_text(room.free)} free of {size_text(room.total)}" for name, room in rooms.items()},
        "hub": hub_line(),
        "pairs": f"both models at once: {', '.join(fitting)}" if fitting else "no pair beyond the embedded one",
        "first": "diffing demo, the embedded pair: minutes on a processor, 1 GB of memory",
    }
    rows = [
        row(f"doctor.{name.replace(' ', '_')}.{part}", getattr(room, part), "bytes", 1)
        for name, room in rooms.items()
        for part in ("free", "total")
    ]
    text = "\n".join(f"{name + ':':<18}{line}" for name, line in lines.items())
    described = {"name": "doctor", "config": to_dict(settings), "rows": rows}
    return described | {"machine": lines, "pairs": fitting, "text": text}


def pairs_that_fit(n_bytes: int, bytes_per_weight: int) -> list[str]:
    """Return the models of which two fit into a memory, with `BESIDE`."""
    return [name for name, weights in SIZES.items() if 2 * weights * bytes_per_weight + BESIDE <= n_bytes]


class Gpu(NamedTuple):
    """One GPU, as nvidia-smi lists it."""

    name: str
    room: Room


def list_gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi lists; none where it is not there, fails, or takes over five seconds."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    entries = re.findall(r"^(.+), *(\d+), *(\d+)$", said, re.M)
    return [Gpu(name, Room(int(free) << 20, int(total) << 20)) for name, free, total in entries]  # MiB


def gpu_line(gpus: list[Gpu]) -> str:
    """Say which GPUs there are, and whether the installed torch is one for them."""
    if not gpus:
        return "none that nvidia-smi lists; models run on the processor"
    without = ", but the installed torch is one for processors alone" if version_of("torch").endswith("+cpu") else ""
    return ", ".join(gpu.name for gpu in gpus) + without


def instructions() -> str:
    """Say what the processor can at once, and whether it multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.is_file() else set()
    widest = "AVX512" if {"avx512f", "avx512bw", "avx512vl"} <= flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{widest}, {'bfloat16' if {'avx512_bf16', 'amx_bf16'} & flags else 'bfloat16 only emulated'}"


def hub_line() -> str:
    """Say whether a token of the hub is there, and where its files are kept; asks nobody."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_TOKEN_PATH

    is_there = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or Path(HF_TOKEN_PATH).is_file()
    token = "a token is there" if is_there else "no token: public models only (`hf auth login`)"
    return f"{token}; files in {HF_HUB_CACHE}"


def version_of(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
