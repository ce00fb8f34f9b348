"""How much memory a command will need, before anything loads; docs/log.md compares the estimates with measured peaks.

`cache_need` and `train_need` estimate, `require` compares with what the machine has (`ram_room`, `gpu_room`) and
returns words for the opening line. Parameters are counted on PyTorch's meta device, from configurations alone.
"""

import numpy as np
import torch

from crosscoders.activations.plan import Plan
from crosscoders.activations.scored import DTYPES
from crosscoders.activations.settings import CacheConfig
from crosscoders.common import devices
from crosscoders.common.memory import PROCESS_BYTES, Need
from crosscoders.models import points
from crosscoders.models.names import load_auto
from crosscoders.models.skeleton import parameter_count


def cache_need(config: CacheConfig, plan: Plan, *, n_points: int, device: torch.device, shards: bool = True) -> Need:
    """Return the memory for the models with their largest forward pass, and with `shards` for what waits to be
    written."""
    dtype = devices.model_dtype(config.model_dtype, device)
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
    """Count the parameters of the base model, of the tuned one, and of what is loaded for the tuned one: under an
    adapter the whole model, before its upper layers are cut off."""
    names = [str(point.hook_point) for point in config.points()]
    info = plan.info
    cut = max(map(points.layer_of, names)) + 1 if all(map(points.is_residual, names)) else None
    base = parameter_count(info.base, cut)
    tuned = base if info.adapter else parameter_count(info.tuned, cut)
    return base, tuned, parameter_count(info.base, None) if info.adapter else tuned


def _forward(config: CacheConfig, plan: Plan, n_points: int, dtype: torch.dtype) -> int:
    """Return the bytes of the largest padded batch: one layer at work, and the activations kept of both models."""
    text = load_auto(plan.info.base, "config").get_text_config()
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
        waiting = n_points * rows * width * 2 * d_model * (3 * itemsize + 2 * DTYPES[config.dtype].itemsize)
        largest = max(largest, layer + waiting)
    return largest
