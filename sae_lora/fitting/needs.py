"""How much memory a fit or an evaluation needs, from configurations alone; docs/log.md has measured peaks beside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from crosscoders.common import devices
from crosscoders.common.memory import PROCESS_BYTES, Need
from crosscoders.models import points
from crosscoders.models.points import first_layer_after
from crosscoders.models.skeleton import parameter_count
from sae_lora.fitting.inputs import Plan
from sae_lora.fitting.settings import FitConfig, TextConfig
from sae_lora.lora.targets import find_targets

MEND = "Lower --batch-rows or --context-length, or use a smaller dictionary or another --device."


def fit_need(config: FitConfig, plan: Plan, layers: Sequence[int], device: torch.device) -> Need:
    """Return the memory for weights, dictionaries, what is trained (gradient and moments), and the largest step."""
    sizes = [(info.d_model, info.dict_size) for info in plan.infos]
    n_trained = {
        "lora": find_targets(plan.skeleton, layers).n_weights(config.rank),
        "mean-scale": sum(d + 1 for d, _ in sizes),
        "affine": sum(d * (d + 1) for d, _ in sizes),
        "sae": sum(n * (2 * d + 1) + d for d, n in sizes),
    }[config.corrector]
    # From the lowest weight that is trained on, a pass keeps what the backward pass reads.
    n_kept = plan.n_layers - (layers[0] if layers else first_layer_after(plan.infos[0].hook_point))
    n_logits = config.chosen_chunk(device.type)
    need = _need(config, plan, device, n_trained=n_trained, n_kept=n_kept, n_logits=n_logits)
    if config.store != "memory":
        return need
    config_of: Any = plan.skeleton.config
    itemsize = devices.model_dtype(config.model_dtype, device).itemsize
    states = 2 * itemsize * plan.rows.n_scored * int(config_of.get_text_config().hidden_size)
    if device.type == "cuda":
        return need._replace(gpu=need.gpu + states)
    return need._replace(ram=need.ram + states)


def eval_need(config: TextConfig, plan: Plan, device: torch.device) -> Need:
    """Return the memory for weights, dictionaries, and the largest batch; logits exist of one sequence."""
    return _need(config, plan, device, n_trained=0, n_kept=0, n_logits=config.context_length)


def _need(config: TextConfig, plan: Plan, device: torch.device, *, n_trained: int, n_kept: int, n_logits: int) -> Need:
    """Return the memory of a run. n_kept: layers that keep what the backward pass reads. n_logits: positions that have
    logits at a time."""
    dtype = devices.model_dtype(config.model_dtype, device)
    config_of: Any = plan.skeleton.config
    text = config_of.get_text_config()
    n_tokens, scores = _largest(config, plan, int(text.num_attention_heads))
    itemsize = dtype.itemsize
    weights = itemsize * sum(weight.numel() for weight in plan.skeleton.parameters())
    if plan.other is not None:
        weights += itemsize * parameter_count(plan.other["name"], points.layer_of(plan.infos[0].hook_point) + 1)
    dictionaries = sum(4 * info.dict_size * (2 * info.d_model + 2) for info in plan.infos)
    latents = max(4 * 3 * n_tokens * info.dict_size for info in plan.infos)
    d_model, wide = int(text.hidden_size), getattr(text, "intermediate_size", None) or 4 * int(text.hidden_size)
    # Of a layer: inputs of its maps and norms, queries to outputs, the gated MLP; and the scores, with their soft cap
    # and float32 probabilities, where attention runs in eager mode.
    layer = itemsize * n_tokens * (22 * d_model + 6 * wide)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        layer += scores * (3 * itemsize + 4)
    # One model's logits, one copy more while they are made, two more under a soft cap, and their gradient; in float32
    # log p, log q, p and the products of the KL.
    is_capped = getattr(text, "final_logit_softcapping", None) is not None
    n_copies = 2 + 2 * is_capped + bool(n_trained)
    logits = min(n_logits, n_tokens) * int(text.vocab_size) * (itemsize * n_copies + 4 * 4)
    step = max(n_kept, 1) * layer + logits + latents
    if device.type == "cuda":
        return Need(PROCESS_BYTES + weights + 12 * n_trained, weights + dictionaries + 16 * n_trained + step, device)
    return Need(PROCESS_BYTES + weights + dictionaries + 16 * n_trained + max(step, 12 * n_trained))


def _largest(config: TextConfig, plan: Plan, n_heads: int) -> tuple[int, int]:
    """Return the positions of the largest padded batch, and attention scores of one layer on it."""
    lengths = np.diff(plan.rows.offsets)
    shapes = [(len(numbers), int(lengths[numbers].max())) for numbers in plan.rows.batches(config.batch_rows)]
    rows, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    return rows * width, n_heads * max(rows * width * width for rows, width in shapes)
