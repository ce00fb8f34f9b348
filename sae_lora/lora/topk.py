"""TopKLoRA on a whole model: which modules, on and off, save and load.

    adapter = TopKLoRA.attach(model, TopKLoRAConfig(rank=64, k=8))
    with adapter.disabled(): ...            # the base model, bit for bit
    adapter.save(folder); TopKLoRA.load(model, folder)

The model's own modules and weights are not touched: deltas are added by forward hooks, so several adapters can be on
one model and add up. It cannot be merged, since what it adds is no matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.hub import repository_folder
from crosscoders.common.records import FileRecord, Record
from crosscoders.models import hooks
from sae_lora.lora.layer import SparseLoRA, SparseLoRATable
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.targets import find_targets

FORMAT, FORMAT_VERSION = "model-diffing/topk-lora", 1
CONFIG, WEIGHTS = "topk_lora.json", "topk_lora.safetensors"


class SiteRecord(Record):
    """Shape of one adapted module."""

    kind: Literal["linear", "embedding"]
    d_in: int
    d_out: int


class TopKLoRARecord(Record):
    """topk_lora.json"""

    version = FORMAT_VERSION
    again = "fit again"
    format: Literal["model-diffing/topk-lora"]
    format_version: int
    config: dict[str, Any]
    k_now: int | None = Field(default=None, ge=1)
    sites: dict[str, SiteRecord]
    weights: FileRecord


class TopKLoRA(nn.Module):
    """All adapted modules of one model, by name in `sites`."""

    def __init__(self, model: nn.Module, config: TopKLoRAConfig) -> None:
        super().__init__()
        self.config, self.k_now, self._enabled = config, config.k, True
        self.sites: dict[str, SparseLoRA] = {}
        self._handles: list[Any] = []
        device = next(model.parameters()).device
        for name, module in _targets(model, config).items():
            site = _site(name, module, config, model)
            if isinstance(site, SparseLoRATable):
                head = model.get_output_embeddings()  # type: ignore[operator]
                is_tied = head is not None and head.weight is module.weight
                site.heads = [head] if is_tied else []
            self.sites[name] = site.to(device)
            self.add_module(name.replace(".", "/"), site)
            self._handles += site.attach(module, lambda: self._enabled)
        self.eval()

    @classmethod
    def attach(cls, model: nn.Module, config: TopKLoRAConfig) -> "TopKLoRA":
        """Put a fresh adapter on a Hugging Face model; its weights are frozen, and the model computes what it did.

        Raises:
            InputError: the names match nothing, or a layer is not there.
        """
        model.requires_grad_(False)
        adapter = cls(model, config)
        generator = torch.Generator().manual_seed(config.seed)
        for site in adapter.sites.values():
            std = 1.0 if isinstance(site, SparseLoRATable) else site.A.shape[1] ** -0.5
            device = site.A.device
            site.to("cpu").init_weights_(std, generator)
            site.to(device)
        return adapter

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, bit for bit, inside the block."""
        was, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = was

    def detach(self) -> None:
        """Take the adapter off its model for good."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def merge(self) -> None:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a TopKLoRA cannot be merged: which directions a token uses depends on the token. Keep it as an adapter."
        )

    def set_progress(self, fraction: float) -> None:
        """Set k for a share of the training steps."""
        self.k_now = self.config.k_at(fraction)
        for site in self.sites.values():
            site.k = self.k_now

    def revive_(self, n_tokens: int, generator: torch.Generator) -> int:
        """Draw anew the directions that have not fired on the last `n_tokens` tokens of training; return their
        number."""
        return sum(site.revive_(n_tokens, generator) for site in self.sites.values())

    @contextmanager
    def multiplied(self, multipliers: dict[str, Tensor]) -> Iterator[None]:
        """Multiply post-gate activations of some sites inside the block: 0 ablates a direction, 1 leaves it."""
        unknown = [name for name in multipliers if name not in self.sites]
        if unknown:
            raise InputError(f"the adapter has no module {unknown[0]!r}. It has {', '.join(list(self.sites)[:4])} ...")
        before = {name: self.sites[name].multiplier for name in multipliers}
        try:
            for name, multiplier in multipliers.items():
                self.sites[name].multiplier = multiplier
            yield
        finally:
            for name, old in before.items():
                self.sites[name].multiplier = old

    @contextmanager
    def observed(self, observers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """Hand the post-gate activations of some sites to functions inside the block."""
        try:
            for name, observer in observers.items():
                self.sites[name].observer = observer
            yield
        finally:
            for name in observers:
                self.sites[name].observer = None

    def save(self, folder: str | Path) -> None:
        """Write topk_lora.safetensors and, last, topk_lora.json; plain PEFT finds no adapter there."""
        path = Path(folder)
        weights = {
            f"{name}.{key}": value for name, site in self.sites.items() for key, value in site.state_dict().items()
        }
        written = files.write_tensors(path / WEIGHTS, weights)
        sites = {
            name: {
                "kind": "embedding" if isinstance(site, SparseLoRATable) else "linear",
                "d_in": site.A.shape[1],
                "d_out": site.W_out.shape[1],
            }
            for name, site in self.sites.items()
        }
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": asdict(self.config),
            "k_now": self.k_now,
            "sites": sites,
            "weights": written._asdict(),
        }
        # So that plain PEFT stops at a kind that it does not know, in place of reading a dense LoRA.
        files.write_json(path / "adapter_config.json", {"peft_type": "TOPKLORA", "r": self.config.rank})
        files.write_json(path / CONFIG, record)

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path) -> "TopKLoRA":
        """Put a saved adapter, from a folder or a repository of the hub, on the model that it was trained on.

        Raises:
            InputError: no adapter there, or one for other modules.
            CorruptData: its weights are not those that were saved.
        """
        path = repository_folder(folder)
        path = path / "adapter" if (path / "adapter" / CONFIG).is_file() else path
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} holds no TopKLoRA: there is no {CONFIG}. Give a run of `diffing topk-lora fit`.")
        record = files.read_model(path / CONFIG, TopKLoRARecord)
        adapter = cls(model, TopKLoRAConfig(**record["config"]))
        try:
            adapter._require_sites(record["sites"], path)
            expected = files.Written(**{key: record["weights"][key] for key in ("n_bytes", "checksum")})
            weights = files.read_tensors(path / WEIGHTS, expected)
            for name, site in adapter.sites.items():
                own = {key: weights.pop(f"{name}.{key}", None) for key in site.state_dict()}
                if any(value is None or value.shape != site.state_dict()[key].shape for key, value in own.items()):
                    raise CorruptData(f"{path / WEIGHTS} lacks weights of {name!r}. Fit again.")
                site.load_state_dict(own)
        except Exception:
            adapter.detach()
            raise
        model.requires_grad_(False)
        adapter.k_now = record["k_now"]
        for site in adapter.sites.values():
            site.k = adapter.k_now
        return adapter

    def _require_sites(self, saved: dict[str, Any], path: Path) -> None:
        ours = {name: (site.A.shape[1], site.W_out.shape[1]) for name, site in self.sites.items()}
        theirs = {name: (site["d_in"], site["d_out"]) for name, site in saved.items()}
        for name in {**theirs, **ours}:
            if ours.get(name) != theirs.get(name):
                raise InputError(
                    f"the adapter in {path} is for another model: {name!r} has widths {theirs.get(name)} there and "
                    f"{ours.get(name)} here. Load it on the model that it was trained on."
                )


def _targets(model: nn.Module, config: TopKLoRAConfig) -> dict[str, nn.Module]:
    """Return the modules to adapt, by name."""
    n_layers = len(hooks.decoder_layers(model))
    layers = range(n_layers) if config.layers is None else config.layers
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong:
        raise InputError(f"layer {wrong[0]} is not there: the model has layers 0 to {n_layers - 1}.")
    by_name = dict(model.named_modules())
    names = find_targets(model, layers).modules
    if config.modules is not None:
        blocks = {id(hooks.decoder_layers(model)[layer]) for layer in layers}
        names += [f"{name}.mlp" for name, module in by_name.items() if id(module) in blocks and hasattr(module, "mlp")]
        endings = {name.rsplit(".", 1)[-1] for name in names}
        unknown = [name for name in config.modules if name not in endings]
        if unknown:
            raise InputError(f"no linear map is called {unknown[0]!r}; there are {', '.join(sorted(endings))}.")
        names = [name for name in names if name.rsplit(".", 1)[-1] in config.modules]
    targets = {name: by_name[name] for name in names}
    if config.embedding:
        table = model.get_input_embeddings()  # type: ignore[operator]
        targets[next(name for name, module in by_name.items() if module is table)] = table
    if not targets:
        raise InputError("no linear map is adapted. Name layers that have some, or set embedding.")
    return targets


def _site(name: str, module: nn.Module, config: TopKLoRAConfig, model: nn.Module) -> SparseLoRA:
    is_table = isinstance(module, nn.Embedding)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        d_out, d_in = (weight.shape[1], weight.shape[0]) if is_table else tuple(weight.shape)
        if not is_table and not isinstance(module, nn.Linear):  # Conv1D holds (in, out)
            d_in, d_out = d_out, d_in
    else:
        d_in = d_out = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    kind = SparseLoRATable if is_table else SparseLoRA
    return kind(
        name, d_in, d_out, rank=config.rank, k=config.k, gate=config.gate, scale=alpha / config.rank,
        estimator=config.estimator, temperature=config.temperature,
    )  # fmt: skip


def n_directions(adapter: TopKLoRA) -> int:
    """Return the number of directions of all sites."""
    return sum(site.rank for site in adapter.sites.values())
