"""LoRA on chosen layers through stock PEFT, and the folder of a fit: weights and a sidecar that names dictionaries.

The sidecar, `splice.json`, is written last. An adapter is meant for the model with its dictionaries spliced in, so
`load_adapter` refuses a folder without it, and other dictionaries than those it names. The folder of a corrector other
than LoRA (`correctors`) has the same sidecar.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosscoders.common.errors import InputError
from crosscoders.models.adapters import with_adapter
from crosscoders.models.names import quiet_transformers
from crosscoders.models.points import first_layer_after
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary
from sae_lora.lora.sidecar import read_sidecar, require_same_dictionaries
from sae_lora.lora.targets import find_targets


@contextlib.contextmanager
def lora_off(model: Any) -> Iterator[None]:
    """Run the model without its LoRA, if it has any.

    As PEFT's `disable_adapter`, which also reads the state of every weight of the model each time.
    """
    if not hasattr(model, "disable_adapter"):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    on = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in on:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)


def choose_layers(layers: str | list[int], infos: Sequence[DictionaryInfo], n_layers: int) -> list[int]:
    """Return the numbers of the layers that get LoRA.

    Raises:
        InputError: no layer after the dictionary, or one that the model does not have.
    """
    if layers == "all":
        return list(range(n_layers))
    if isinstance(layers, list):
        wrong = [layer for layer in layers if not 0 <= layer < n_layers]
        if wrong:
            raise InputError(f"layers has {wrong[0]}, but the model has layers 0 to {n_layers - 1}. Leave it out.")
        return sorted(layers)
    first = min(first_layer_after(info.hook_point) for info in infos)
    if first >= n_layers:
        raise InputError(
            f"no layer is after {infos[0].hook_point!r}: the model has layers 0 to {n_layers - 1}. Use --layers all, "
            "or a dictionary of a lower layer."
        )
    return list(range(first, n_layers))


def add_lora(
    model: nn.Module, layers: Sequence[int], *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> Any:
    """The model as a PEFT model with LoRA on every linear map of these layers (`targets`); it computes what it did,
    since B = 0.

    Raises:
        InputError: no linear maps in those layers; dropout on experts.
    """
    with quiet_transformers():
        import peft
    targets = find_targets(model, layers)
    if not targets.shapes:
        raise InputError(f"the layers of {type(model).__name__} hold no linear maps that LoRA could adapt.")
    config = targets.config(rank=rank, alpha=alpha, dropout=dropout)
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config).eval()


def load_adapter(model: nn.Module, folder: str | Path, dictionaries: Sequence[FrozenDictionary]) -> Any:
    """Load a saved adapter onto the model, after checking that the dictionaries are those that it was fitted around.

    Raises:
        InputError: as `read_sidecar` and `require_same_dictionaries`; the folder of another corrector.
    """
    sidecar = read_sidecar(folder)
    if sidecar["corrector"] != "lora":
        raise InputError(
            f"{sidecar['folder']} is corrector {sidecar['corrector']!r}, no LoRA. Use sae_lora.load_corrector."
        )
    require_same_dictionaries(sidecar, dictionaries)
    return with_adapter(model, sidecar["folder"]).eval()
