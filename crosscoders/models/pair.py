"""Load a base and a tuned model with one tokenizer, after checking that they fit together.

`inspect_pair` reads configurations and tokenizers only, and finds everything that can be wrong before weights load;
`load_pair` then loads both models, cut off above the deepest hook point. A model is a local folder, a hub id, or (the
tuned one) a PEFT adapter of the base model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoders.common import files
from crosscoders.common.devices import choose_device, model_dtype
from crosscoders.common.errors import InputError
from crosscoders.models import hooks, points
from crosscoders.models.adapters import require_adapter, with_adapter
from crosscoders.models.loading import load_model, one_line_errors, require_loadable, require_whole
from crosscoders.models.names import (
    PROBE,
    hash_model,
    is_adapter,
    load_auto,
    one_tokenizer,
    quiet_transformers,
    require_no_lost_path,
)
from crosscoders.models.skeleton import bridge_names
from crosscoders.text.padding import Batch


@dataclass(frozen=True)
class PairInfo:
    """What is known of a pair before its weights load."""

    base: str
    tuned: str
    adapter: str | None
    """PEFT adapter folder or id, where `tuned` is one; the tuned weights are then base + adapter."""
    tokenizer: Any
    d_model: int
    n_layers: int
    n_ids: int
    """Rows of the smaller embedding. The tokenizer may know more ids, if no document holds them."""

    def models(self) -> list[str]:
        """Return the whole models of the pair."""
        return [self.base] if self.adapter else [self.base, self.tuned]

    def hashes(self) -> dict[str, Any]:
        """Return the content hashes for a manifest: local weights and configuration files, or the hub's commit."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return {
            "base": {"name": self.base, "hash": hash_model(self.base)},
            "tuned": {"name": self.tuned, "hash": hash_model(self.tuned)},
            "tokenizer_hash": files.hash_json(
                [vocabulary, self.tokenizer.special_tokens_map, self.tokenizer(PROBE)["input_ids"]]
            ),
        }


@dataclass(frozen=True)
class ModelPair:
    """Two models that read the same ids. `models` is (base, tuned), each cut off above the hook points or whole."""

    info: PairInfo
    models: tuple[nn.Module, nn.Module]
    hook_points: list[str]
    device: torch.device

    def activations(self, batch: Batch, hook_point: str) -> Float[Tensor, "rows seq n_models d_model"]:
        """Return the activations of both models on one padded batch, base first."""
        return self.activations_at(batch)[hook_point]

    def activations_at(self, batch: Batch) -> dict[str, Float[Tensor, "rows seq n_models d_model"]]:
        """Return the activations of both models at every hook point, from one forward pass of each."""
        ids, mask, *_ = batch.to(self.device)
        base, tuned = (hooks.run_to(model, self.hook_points, ids, mask) for model in self.models)
        return {name: torch.stack([base.pop(name), tuned.pop(name)], dim=2) for name in self.hook_points}


def inspect_pair(base: str, tuned: str, hook_points: list[str], *, tokenizer: str | None = None) -> PairInfo:
    """Check a pair by configurations and tokenizers alone.

    Raises:
        InputError: a model is not there or is a git-lfs pointer, the base is an adapter, the widths differ, a layer is
            out of range, the tokenizers differ; an adapter of a kind that has no activations of its own.
        EnvironmentFault: quantised weights that cannot be read here.
    """
    for name in (base, tuned, *([tokenizer] if tokenizer else [])):
        require_no_lost_path(name)
    require_whole(base, "base")
    adapter = tuned if is_adapter(tuned) else None
    base_config = load_auto(base, "config")
    tuned_config = base_config if adapter else load_auto(tuned, "config")
    require_loadable(base, base_config)
    require_loadable(tuned, tuned_config)
    if adapter:
        require_adapter(adapter, base)
    for name in (base, tuned):
        for file in Path(name).glob("*.safetensors") if Path(name).is_dir() else ():
            files.refuse_lfs_pointer(file)
    base_text, tuned_text = base_config.get_text_config(), tuned_config.get_text_config()
    if base_text.hidden_size != tuned_text.hidden_size:
        raise InputError(
            f"base {base!r} has d_model {base_text.hidden_size} but tuned {tuned!r} has {tuned_text.hidden_size}. "
            "Choose two models of one size."
        )
    n_layers = min(base_text.num_hidden_layers, tuned_text.num_hidden_layers)
    for hook_point in hook_points:
        require_point(hook_point, n_layers, base, base_text.model_type)
    if adapter and len({points.is_residual(hook_point) for hook_point in hook_points}) > 1:
        raise InputError(
            f"{tuned!r} is an adapter: residual hook points read it unmerged and others merged, so one pass "
            "cannot give both. Cache them in two runs."
        )
    chosen = one_tokenizer(base, tuned, tokenizer, adapter)
    n_ids = min(base_text.vocab_size, tuned_text.vocab_size)
    return PairInfo(base, tuned, adapter, chosen, base_text.hidden_size, n_layers, n_ids)


def require_point(hook_point: str, n_layers: int, name: str, model_type: str) -> None:
    """Raise InputError, with the nearest name, unless a model has the hook point; no weights are read."""
    points.require_layer(hook_point, n_layers, name, model_type)
    layer = points.layer_of(hook_point)
    if hook_point.removeprefix(f"blocks.{layer}.") not in points.plain_kinds(model_type):
        points.require_named(hook_point, bridge_names(name, layer + 1))


def load_pair(
    base: str,
    tuned: str,
    hook_point: str | list[str],
    *,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    info: PairInfo | None = None,
    whole: bool = False,
) -> ModelPair:
    """Load both models, cut off above the deepest hook point, in evaluation mode.

    Residual-stream hook points load only the layers they need; any other hook point loads whole models through
    TransformerBridge. dtype auto: bfloat16 on a GPU, float32 on a CPU. `whole`: nothing is cut off, and the models give
    logits.

    Raises:
        InputError: as `inspect_pair`; tensors that are missing or left over.
        EnvironmentFault: the device is not there.
        CorruptData: a damaged file.
    """
    hook_points = [hook_point] if isinstance(hook_point, str) else list(hook_point)
    chosen = choose_device(device)
    info = info or inspect_pair(base, tuned, hook_points, tokenizer=tokenizer)
    chosen_dtype = model_dtype(dtype, chosen)
    with quiet_transformers():
        models = tuple(
            _load_model(info, is_tuned, hook_points, chosen, chosen_dtype, whole) for is_tuned in (False, True)
        )
    return ModelPair(info, (models[0], models[1]), hook_points, chosen)


def _load_model(
    info: PairInfo, is_tuned: bool, hook_points: list[str], device: torch.device, dtype: torch.dtype, whole: bool
) -> nn.Module:
    name = info.base if info.adapter or not is_tuned else info.tuned
    n_needed = max(map(points.layer_of, hook_points)) + 1
    if not all(map(points.is_residual, hook_points)):
        return _load_bridge(info, is_tuned, name, device, dtype)
    if is_tuned and info.adapter:
        # An adapter names the layers of the whole model, so the layers above are cut off afterwards.
        model = with_adapter(load_model(name, dtype), info.adapter).get_base_model()
        if not whole:
            model = model.base_model
            del hooks.decoder_layers(model)[n_needed:]
    elif whole:
        model = load_model(name, dtype)
    else:
        model = load_model(name, dtype, n_layers=n_needed, with_head=False)
    module: nn.Module = model.eval().requires_grad_(False).to(device)
    return module


def _load_bridge(info: PairInfo, is_tuned: bool, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformer_lens.model_bridge import TransformerBridge

    loaded = load_model(name, dtype)
    if is_tuned and info.adapter:
        # The bridge renames modules, so an adapter has to be merged before it.
        loaded = with_adapter(loaded, info.adapter).merge_and_unload()
    with one_line_errors(name):
        bridge = TransformerBridge.boot_transformers(
            name,
            hf_model=loaded.eval().requires_grad_(False).to(device),
            tokenizer=info.tokenizer,
            device=str(device),
            dtype=dtype,
        )
    module: nn.Module = bridge
    return module
