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

from crosscoders import hooks, store
from crosscoders.errors import CorruptData, InputError
from crosscoders.pair import quiet_transformers
from sae_lora.dictionary import DictionaryInfo, FrozenDictionary

FORMAT = "model-diffing/sae-lora"
FORMAT_VERSION = 1
SIDECAR = "splice.json"
CORRECTOR_WEIGHTS = "corrector.safetensors"


def weights_file(corrector: str) -> str:
    """Name of the file with the weights that were trained."""
    return "adapter_model.safetensors" if corrector == "lora" else CORRECTOR_WEIGHTS


@contextlib.contextmanager
def lora_off(model: Any) -> Iterator[None]:
    """The model without its LoRA, if it has any.

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


def first_layer_after(hook_point: str) -> int:
    """The first layer that reads what stands at the hook point."""
    return hooks.layer_of(hook_point) + (not hook_point.endswith("hook_resid_pre"))


def choose_layers(layers: str | list[int], infos: Sequence[DictionaryInfo], n_layers: int) -> list[int]:
    """Numbers of the layers that get LoRA.

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
    """The model as a PEFT model with LoRA on every linear map of these layers; it computes what it did, since B = 0.

    Raises:
        InputError: no linear maps in those layers.
    """
    import peft

    blocks = hooks.decoder_layers(model)
    wanted = {id(module) for layer in layers for module in blocks[layer].modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    if not names:
        raise InputError(f"the layers of {type(model).__name__} hold no linear maps that LoRA could adapt.")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config).eval()


def write_sidecar(
    folder: Path, dictionaries: Sequence[FrozenDictionary], keep_ids: Sequence[int], described: dict[str, Any]
) -> None:
    """Describe the weights in a folder. `described`: what else is recorded (model, tokens, corrector, layers)."""
    sidecar = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **described,
        "mode": "replace",
        "kept_positions": {"padding": True, "token_ids": list(keep_ids)},
        "dictionaries": [dictionary.identity() for dictionary in dictionaries],
        "weights": store.written(folder / weights_file(described["corrector"]))._asdict(),
    }
    store.write_json(folder / SIDECAR, sidecar)


def read_sidecar(folder: str | Path) -> dict[str, Any]:
    """The sidecar of an adapter folder, or of the `adapter` in a run folder, with `folder` added.

    Raises:
        InputError: no adapter, or one without a sidecar, or of another version.
        CorruptData: the adapter's weights are not those that were saved.
    """
    path = Path(folder)
    path = path / "adapter" if (path / "adapter").is_dir() else path
    if not (path / "adapter_config.json").is_file() and not (path / SIDECAR).is_file():
        raise InputError(f"{path} holds no adapter: there is no {SIDECAR}. Give a run of `sae-lora fit`.")
    if not (path / SIDECAR).is_file():
        raise InputError(
            f"{path} is an adapter without {SIDECAR}, which names the dictionary that it was fitted around. Copy the "
            "whole folder of `sae-lora fit`, or load it with plain PEFT if it is none."
        )
    keys = ("format", "format_version", "model", "tokens", "corrector", "dictionaries", "weights")
    found = store.read_object(path / SIDECAR, *keys)
    if (found["format"], found["format_version"]) != (FORMAT, FORMAT_VERSION):
        raise InputError(
            f"{path / SIDECAR} has format {found['format']!r} version {found['format_version']}; expected {FORMAT!r} "
            f"version {FORMAT_VERSION}."
        )
    weights = path / weights_file(found["corrector"])
    if not weights.is_file() or store.written(weights)._asdict() != found["weights"]:
        raise CorruptData(f"{weights} is not the file that {SIDECAR} describes. Copy or fit it again.")
    return {**found, "folder": str(path)}


def require_same_dictionaries(sidecar: dict[str, Any], dictionaries: Sequence[FrozenDictionary]) -> None:
    """Raise InputError unless these are the dictionaries, at the hook points, that the adapter was fitted around."""
    found = {dictionary.hook_point: dictionary for dictionary in dictionaries}
    for entry in sidecar["dictionaries"]:
        point = entry["hook_point"]
        if point not in found:
            raise InputError(f"the adapter {sidecar['folder']!r} needs a dictionary at {point!r}; none was given.")
        content = found.pop(point).content_hash()
        if content != entry["hash"]:
            raise InputError(
                f"the dictionary at {point!r} has hash {content[:12]} but the adapter {sidecar['folder']!r} was fitted "
                f"around {entry['hash'][:12]} ({entry['path']}). Give that one."
            )
    if found:
        raise InputError(
            f"the adapter {sidecar['folder']!r} knows no dictionary at {next(iter(found))!r}. Leave it out."
        )


def load_adapter(model: nn.Module, folder: str | Path, dictionaries: Sequence[FrozenDictionary]) -> Any:
    """The model with a saved adapter, after checking that the dictionaries are those that it was fitted around.

    Raises:
        InputError: as `read_sidecar` and `require_same_dictionaries`; the folder of another corrector.
    """
    import peft

    sidecar = read_sidecar(folder)
    if sidecar["corrector"] != "lora":
        raise InputError(
            f"{sidecar['folder']} is corrector {sidecar['corrector']!r}, no LoRA. Use sae_lora.load_corrector."
        )
    require_same_dictionaries(sidecar, dictionaries)
    with quiet_transformers():
        return peft.PeftModel.from_pretrained(model, sidecar["folder"]).eval()
