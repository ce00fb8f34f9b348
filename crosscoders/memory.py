"""How much memory a command will need, before anything loads; docs/log.md compares the estimates with measured peaks.

`cache_need` and `train_need` estimate, `require` compares with what the machine has free (`free_ram`, `free_gpu`) and
returns words for the opening line. Parameters are counted on PyTorch's meta device, from configurations alone.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from crosscoders import hooks, pair
from crosscoders.config import CacheConfig, TrainConfig
from crosscoders.errors import EnvironmentFault, InputError
from crosscoders.source import DTYPES, Plan
from crosscoders.store import size_text

PROCESS_BYTES = 150_000_000
"""Modules and allocators that grow once models run (measured on a pair of 1 M parameters)."""


class Need(NamedTuple):
    """Bytes beyond what the process holds now."""

    ram: int
    gpu: int = 0
    device: torch.device | None = None
    """Of `gpu`; None where everything is in RAM."""


def cache_need(config: CacheConfig, plan: Plan, *, n_points: int, device: torch.device, shards: bool = True) -> Need:
    """Of the models with their largest forward pass, and with `shards` of what waits to be written."""
    dtype = pair.model_dtype(config.model_dtype, device)
    base, tuned, loaded = (n * dtype.itemsize for n in _parameters(config, plan))
    run = _forward(config, plan, n_points, dtype)
    itemsize = DTYPES[config.dtype].itemsize
    shard = min(config.shard_tokens, config.n_tokens) * 2 * plan.info.d_model * itemsize
    # Of each hook point one shard is collected and one waits, where there are so many; of the one that is written
    # there are the tokens, and two serialised copies or its values in float64.
    n_shards = -(-config.n_tokens // config.shard_tokens)
    waiting = shard * (min(2, n_shards - 1) * n_points + 1 + max(2, 8 // itemsize)) if shards else 0
    if device.type == "cuda":
        return Need(PROCESS_BYTES + max(base, loaded) + waiting, base + tuned + run, device)
    return Need(PROCESS_BYTES + base + max(tuned + run, loaded) + waiting)


def _parameters(config: CacheConfig, plan: Plan) -> tuple[int, int, int]:
    """Of the base model, of the tuned one, and of what is loaded for the tuned one: under an adapter the whole model,
    before its upper layers are cut off."""
    names = [str(point.hook_point) for point in config.points()]
    info = plan.info
    cut = max(map(hooks.layer_of, names)) + 1 if all(map(hooks.is_residual, names)) else None
    base = parameter_count(info.base, cut)
    tuned = base if info.adapter else parameter_count(info.tuned, cut)
    return base, tuned, parameter_count(info.base, None) if info.adapter else tuned


def parameter_count(name: str, n_layers: int | None) -> int:
    """Parameters of a decoder, cut off above n_layers; None: the whole language model."""
    return sum(parameter.numel() for parameter in skeleton(name, n_layers).parameters())


def skeleton(name: str, n_layers: int | None = None) -> nn.Module:
    """The modules of a decoder without weights, cut off above n_layers; None: the whole language model.

    Raises:
        InputError: the configuration makes no such model.
    """
    import transformers

    limit = {} if n_layers is None else {"num_hidden_layers": n_layers}
    auto: Any = transformers.AutoModelForCausalLM if n_layers is None else transformers.AutoModel
    try:
        with torch.device("meta"), pair.quiet_transformers():
            model: nn.Module = auto.from_config(transformers.AutoConfig.from_pretrained(name, **limit))
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"the configuration of {name!r} makes no model: {lines[0]} Check its config.json.") from error
    return model


def _forward(config: CacheConfig, plan: Plan, n_points: int, dtype: torch.dtype) -> int:
    """Of the largest padded batch: one layer at work, and the activations that are kept of both models."""
    import transformers

    text = transformers.AutoConfig.from_pretrained(plan.info.base).get_text_config()
    d_model, itemsize = plan.info.d_model, dtype.itemsize
    wide = getattr(text, "intermediate_size", None) or 4 * d_model
    heads = text.num_attention_heads
    # Soft-capped attention runs in eager mode, with scores, their soft cap, and probabilities in float32.
    is_eager = getattr(text, "attn_logit_softcapping", None) is not None
    lengths = np.diff(plan.rows.offsets)
    largest = 0
    for numbers in plan.rows.batches(config.batch_rows):
        rows, width = len(numbers), int(lengths[numbers].max())
        scores = rows * heads * width * width * (2 * itemsize + 4) if is_eager else rows * width * width
        layer = max(scores + 6 * rows * width * d_model * itemsize, rows * width * (3 * wide + 3 * d_model) * itemsize)
        # Both models' states, stacked, scored rows alone, cast; and the same of the pass before, as stored.
        kept = n_points * rows * width * 2 * d_model * (3 * itemsize + 2 * DTYPES[config.dtype].itemsize)
        largest = max(largest, layer + kept)
    return largest


def train_need(config: TrainConfig, *, n_models: int, d_model: int, itemsize: int, device: torch.device) -> Need:
    """Of weights, gradients and Adam's moments, the latents of a batch, and the shuffled buffer.

    itemsize: bytes of a stored activation.
    """
    size = config.crosscoder.dict_size
    n_parameters = size * (2 * n_models * d_model + 1) + n_models * d_model
    width = n_models * d_model
    # Pre-activations, and two more of their size in selection or in the dense gradient; inputs and reconstructions.
    batch = config.batch_size * (3 * size + 6 * width) * 4
    # A buffer is joined from shards, so that both are there for a moment.
    buffer = 2 * min(config.buffer_tokens, max(config.n_tokens, config.batch_size)) * width * itemsize
    moments = config.adam_bits // 4
    state = (4 + moments) * n_parameters  # a checkpoint: weights and moments, serialised
    if device.type == "cuda":
        return Need(PROCESS_BYTES + 4 * n_parameters + state + buffer, (8 + moments) * n_parameters + batch, device)
    return Need(PROCESS_BYTES + (8 + moments) * n_parameters + max(batch, state) + buffer)


def require(needs: list[Need], mend: str) -> str:
    """Check what is needed at once. Returns words for the opening line, such as `1.2 GB of memory (22.1 GB free)`.

    Raises:
        EnvironmentFault: it needs more than there is.
    """
    found = [("memory", sum(need.ram for need in needs), free_ram())]
    for device in {str(need.device): need.device for need in needs if need.device is not None}.values():
        wanted = sum(need.gpu for need in needs if need.device == device)
        found.append((f"memory on {device}", wanted, free_gpu(device)))
    for where, wanted, free in found:
        if free is not None and wanted > free:
            raise EnvironmentFault(
                f"this needs about {size_text(wanted)} of {where}, but {size_text(free)} are free. {mend}"
            )
    return ", ".join(
        f"about {size_text(wanted)} of {where}" + (f" ({size_text(free)} free)" if free is not None else "")
        for where, wanted, free in found
    )


def free_gpu(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def free_ram() -> int | None:
    """Bytes that this process may still take: of the machine, and of the control groups it is in; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min([free, *_group_limits()])


def _group_limits() -> list[int]:
    """What is left in each control group of this process, file cache not counted as used."""
    found = []
    try:
        entries = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for entry in entries:
        _, kinds, path = entry.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        # Version 2 has one tree and no kinds, version 1 a tree for each kind.
        root = Path("/sys/fs/cgroup", *(["memory"] if kinds else []))
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
                found.append(max(0, int(limit) - int(used) + cached))
    return found
