"""The device and the number type that a setting means."""

import torch

from crosscoders.common.errors import EnvironmentFault, InputError


def choose_device(device: str) -> torch.device:
    """Return the device that a setting names; `auto` is the first GPU, or the CPU.

    Raises:
        EnvironmentFault: the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {device!r} is unknown. Use auto, cpu, cuda or cuda:N.") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"device {device!r} is not there: this machine has {torch.cuda.device_count()} GPUs. Use --device cpu."
        )
    return chosen


def model_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type that a setting means; auto: bfloat16 on a GPU, float32 on a CPU."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name, auto)


def choose_products(products: str, device: torch.device) -> torch.dtype:
    """Return the type of a training run's dense products: bfloat16 on a GPU, float32 on a CPU, unless named.

    Raises:
        EnvironmentFault: bfloat16 on a CPU that only emulates it.
    """
    if products == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if products == "bfloat16" and device.type == "cpu" and not has_fast_bfloat16():
        raise EnvironmentFault(
            "products 'bfloat16' is emulated by this CPU, up to 300 times slower than float32. Use --products float32."
        )
    return torch.bfloat16 if products == "bfloat16" else torch.float32


def has_fast_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
