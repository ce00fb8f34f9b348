"""A crosscoder over layers of one model, as a dictionary at one of them: `LayerSlot`."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoders.common.errors import InputError
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.formats.gemma_scope_2 import FIRST, read_layers
from crosscoders.formats.load import load_crosscoder
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, run_beside
from sae_lora.dictionaries.places import chosen_hook_point
from sae_lora.dictionaries.tensors import shapes_of, vector_length


class LayerSlot(FrozenDictionary):
    """What a crosscoder over layers makes of one of them, its latents reading all.

    The other layers' activations come from the model beside, on the same ids and without what is spliced.
    """

    def __init__(self, info: DictionaryInfo, crosscoder: Crosscoder, model: nn.Module) -> None:
        super().__init__(info)
        self.crosscoder = crosscoder.requires_grad_(False)
        self.others = [model]  # in a list, so that its weights are no part of the dictionary
        self.slot = info.settings["hook_points"].index(info.hook_point)
        self.beside: Tensor | None = None

    def begin(self, ids: Int[Tensor, "rows seq"], attention_mask: Tensor | None) -> None:
        points = self.info.settings["hook_points"]
        activations = run_beside(self.others[0], points, ids, attention_mask, self.dtype)
        self.beside = torch.stack([activations[point] for point in points], dim=1)

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens dict_size"]:
        assert self.beside is not None and len(self.beside) == len(x)
        layers = [x if number == self.slot else layer for number, layer in enumerate(self.beside.unbind(dim=1))]
        return self.crosscoder.encode(torch.stack(layers, dim=1))

    def decode(self, latents: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, "tokens d_model"]:
        return self.crosscoder.decode(latents)[:, self.slot]


def inspect(path: Path, hook_point: str | None, model_type: str | None) -> DictionaryInfo:
    """Return what headers and settings say of a folder; the hook point chooses the slot."""
    layers, model_name = read_layers(path)
    points = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    if hook_point is None:
        raise InputError(f"{str(path)!r} reads several layers. Choose one: --hook-point {' or '.join(points)}.")
    chosen = chosen_hook_point(None, hook_point, path, model_type)
    if chosen not in points:
        raise InputError(f"{str(path)!r} reads {', '.join(points)}, not {chosen!r}. Choose one of them.")
    shapes = shapes_of(path / FIRST)
    return DictionaryInfo(
        layout="layer-crosscoder",
        path=str(path),
        hook_point=chosen,
        d_model=vector_length(path / FIRST, shapes, "b_dec"),
        dict_size=vector_length(path / FIRST, shapes, "b_enc") * len(layers),
        settings={"hook_points": points, "hook_point": chosen},
        model_names=(model_name,) if model_name else (),
    )


def read(info: DictionaryInfo, path: Path, model: nn.Module | None) -> FrozenDictionary:
    """Read the weights; `model`: the model itself, as far as the highest layer that is read."""
    if model is None:
        raise InputError(
            f"{info.path!r} is a crosscoder over layers, whose latents need the activations of all of them. Read it "
            "with load_crosscoder, or splice it with sae-lora, which runs the model beside."
        )
    return LayerSlot(info, load_crosscoder(path), model)
