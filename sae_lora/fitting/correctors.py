r"""What a fit may train around a frozen dictionary, from the cheapest on; every one starts at "nothing changed".

    mean-scale   x_hat -> (1 + scale) x_hat + shift     one scale, shift (d_model,)
    affine       x_hat -> x_hat + x_hat W + shift       W (d_model, d_model)
    sae          the dictionary's own weights, all but its thresholds; the rule by which latents are active stays
    lora         LoRA in the model, see `adapter`

Where decode is linear and selection does not read decoder norms, each of the first three can express the one before: an
affine map after a decoder is another decoder. They leave the model alone, so that without the dictionary nothing
changes. `start` makes a corrector; `save` and `load_corrector` keep it in a folder with the sidecar of `adapter`.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoders.common import files
from crosscoders.common.errors import InputError
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.fitting.settings import CorrectorKind, FitConfig
from sae_lora.lora import adapter, sidecar


class Fitted(NamedTuple):
    """A model and its dictionaries with a corrector between or inside them."""

    model: Any
    """Under PEFT if the corrector is LoRA, else as it was."""
    dictionaries: list[FrozenDictionary]
    """What is spliced while the corrector is on."""
    weights: list[nn.Parameter]
    """What is trained."""

    @property
    def n_weights(self) -> int:
        return sum(weight.numel() for weight in self.weights)


class Corrected(FrozenDictionary):
    """A dictionary and a map after it; the map's parameters are the only trainable ones, in float32."""

    def __init__(self, source: FrozenDictionary) -> None:
        super().__init__(source.info)
        self.source = source.requires_grad_(False)
        device = next(iter(source.state_dict().values())).device
        self.shift = nn.Parameter(torch.zeros(source.info.d_model, device=device))

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def correct(self, x_hat: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        raise NotImplementedError

    def begin(self, ids: Int[Tensor, "rows seq"], attention_mask: Tensor | None) -> None:
        self.source.begin(ids, attention_mask)

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        return self.source.encode(x)

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        return self.correct(self.source.decode(latents))

    def reconstruct(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens dict_size"], Float[Tensor, "tokens d_model"]]:
        latents, x_hat = self.source.reconstruct(x)
        return latents, self.correct(x_hat)


class MeanScale(Corrected):
    """x_hat -> (1 + scale) x_hat + shift; one scale, since no direction of the residual stream is special."""

    def __init__(self, source: FrozenDictionary) -> None:
        super().__init__(source)
        self.scale = nn.Parameter(torch.zeros_like(self.shift[0]))

    def correct(self, x_hat: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        x_hat = x_hat.to(torch.promote_types(x_hat.dtype, torch.float32))
        return x_hat + self.scale * x_hat + self.shift


class Affine(Corrected):
    """x_hat -> x_hat + x_hat W + shift. Source: the linear adapter of Karvonen 2025, arXiv 2503.17272."""

    def __init__(self, source: FrozenDictionary) -> None:
        super().__init__(source)
        d_model = source.info.d_model
        self.W = nn.Parameter(torch.zeros(d_model, d_model, device=self.shift.device))

    def correct(self, x_hat: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        x_hat = x_hat.to(torch.promote_types(x_hat.dtype, torch.float32))
        return x_hat + x_hat @ self.W.to(x_hat.dtype) + self.shift


def trainable_copy(dictionary: FrozenDictionary) -> FrozenDictionary:
    """Return a copy whose weights train, all but thresholds, through which no gradient goes.

    Raises:
        InputError: weights in less than float32, which small steps would not move.
    """
    if torch.finfo(dictionary.dtype).bits < 32:
        raise InputError(
            f"corrector 'sae' trains weights in float32, but {dictionary.info.path!r} has {dictionary.dtype}. "
            "Convert it, or choose another corrector."
        )
    shared = {id(model): model for model in getattr(dictionary, "others", [])}  # the pair's other model stays one
    copied = copy.deepcopy(dictionary, shared)
    for name, weight in copied.named_parameters():
        weight.requires_grad_("threshold" not in name)
    return copied


_MAKERS = {"mean-scale": MeanScale, "affine": Affine, "sae": trainable_copy}


def _correct(model: Any, dictionaries: Sequence[FrozenDictionary], corrector: CorrectorKind) -> Fitted:
    corrected = [_MAKERS[corrector](dictionary) for dictionary in dictionaries]
    return Fitted(model, corrected, [w for each in corrected for w in each.parameters() if w.requires_grad])


def start(config: FitConfig, model: nn.Module, dictionaries: Sequence[FrozenDictionary], layers: list[int]) -> Fitted:
    """Make the corrector of a config, before its first step. `layers`: those that get LoRA."""
    if config.corrector != "lora":
        return _correct(model, dictionaries, config.corrector)
    adapted = adapter.add_lora(
        model, layers, rank=config.rank, alpha=config.chosen_alpha(), dropout=config.dropout, seed=config.seed
    )
    return Fitted(adapted, list(dictionaries), [w for w in adapted.parameters() if w.requires_grad])


def save(
    fitted: Fitted,
    folder: Path,
    dictionaries: Sequence[FrozenDictionary],
    keep_ids: Sequence[int],
    described: dict[str, Any],
) -> None:
    """Write the weights, then the sidecar about `dictionaries`, those that the fit started from."""
    if described["corrector"] == "lora":
        fitted.model.save_pretrained(folder, save_embedding_layers=False)
    else:
        files.write_tensors(folder / sidecar.CORRECTOR_WEIGHTS, dict(_named(fitted.dictionaries)))
    sidecar.write_sidecar(folder, dictionaries, keep_ids, described)


def load_corrector(model: nn.Module, folder: str | Path, dictionaries: Sequence[FrozenDictionary]) -> Fitted:
    """Load what `sae-lora fit` saved, on a model and the dictionaries that it was fitted around, from the lowest on.

    Raises:
        InputError: as `sidecar.read_sidecar` and `sidecar.require_same_dictionaries`.
        CorruptData: as `sidecar.read_sidecar`.
    """
    described = sidecar.read_sidecar(folder)
    if described["corrector"] == "lora":
        adapted = adapter.load_adapter(model, folder, dictionaries)
        return Fitted(adapted, list(dictionaries), [w for name, w in adapted.named_parameters() if "lora_" in name])
    sidecar.require_same_dictionaries(described, dictionaries)
    fitted = _correct(model, dictionaries, described["corrector"])
    path = Path(described["folder"]) / sidecar.CORRECTOR_WEIGHTS
    tensors = files.read_tensors(path, files.Written(**described["weights"]))
    named = dict(_named(fitted.dictionaries))
    assert tensors.keys() == named.keys()  # the checksum and the dictionaries' hashes were right
    for name, weight in named.items():
        weight.data.copy_(tensors[name])
        weight.requires_grad_(False)
    return fitted


def _named(dictionaries: Sequence[FrozenDictionary]) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{dictionary.hook_point}.{name}", weight)
        for dictionary in dictionaries
        for name, weight in dictionary.named_parameters()
        if weight.requires_grad
    ]
