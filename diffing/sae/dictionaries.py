"""The dictionary that both models share: checked before weights load, its decoder as directions in the units of x."""

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.models import points
from crosscoders.models.names import hash_model, load_auto
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, is_transcoder, require_fit
from sae_lora.dictionaries.loading import inspect_dictionary, reads_two_models

_PER_TOKEN = ("layer_norm", "constant_norm_rescale")
_CHUNK = 1024


def inspect_sae(path: str, model: str, hook_point: str | None, *, is_patched: bool) -> DictionaryInfo:
    """Check a dictionary against the model that it belongs to, by headers and configurations.

    Raises:
        InputError: a transcoder whose latents shall be patched, another width, layer or hook point, a record of another
            model, a crosscoder of two models, decoders that are another for each token; as `inspect_dictionary`.
    """
    if reads_two_models(path):
        raise InputError(
            f"{path!r} is a crosscoder of two models, not an SAE of one. Read it with diffing scale, or give an SAE."
        )
    config = load_auto(model, "config").get_text_config()
    info = inspect_dictionary(path, hook_point=hook_point, model_type=config.model_type)
    if is_patched and is_transcoder(info):
        raise InputError(
            f"{path!r} is a transcoder: it reads {info.hook_point!r} and writes {info.writes!r}, so its latents cannot "
            "be patched where they are read. Give --n-documents 0: their rates alone."
        )
    width = points.width(config, info.hook_point)
    require_fit(info, d_model=width, n_layers=config.num_hidden_layers, model_name=model, model_hash=hash_model(model))
    if (how := info.settings.get("normalize_activations")) in _PER_TOKEN:
        raise InputError(
            f"{path!r} has normalize_activations {how!r}, so that a latent writes another vector for each token and "
            "cannot be exchanged between models. Use an SAE without it."
        )
    return info


def require_twins(info: DictionaryInfo, twin: DictionaryInfo) -> None:
    """Raise InputError where two dictionaries differ in width, number of latents or hook point."""
    for name in ("hook_point", "d_model", "dict_size"):
        ours, theirs = getattr(info, name), getattr(twin, name)
        if ours != theirs:
            raise InputError(
                f"tuned_sae {twin.path!r} has {name} {theirs!r} but sae {info.path!r} has {ours!r}. Twins share it; "
                "give an SAE that was fine-tuned from the other."
            )


@torch.no_grad()
def directions(dictionary: FrozenDictionary) -> Float[Tensor, "dict_size d_model"]:
    """Return what each latent writes for an activation of 1: decode(e_j) - decode(0), units of x."""
    size = dictionary.info.dict_size
    device = next(iter(dictionary.state_dict().values())).device
    nothing = dictionary.decode(torch.zeros(1, size, device=device, dtype=dictionary.dtype))
    rows = []
    for chosen in torch.arange(size, device=device).split(_CHUNK):
        latents = torch.zeros(len(chosen), size, device=device, dtype=dictionary.dtype)
        latents[torch.arange(len(chosen)), chosen] = 1.0
        rows.append((dictionary.decode(latents) - nothing).float())
    return torch.cat(rows)


def token_chunk(dictionary: FrozenDictionary) -> int:
    """Return how many tokens may be encoded at a time: 2^25 latents, 128 MiB in float32."""
    return max(64, (1 << 25) // dictionary.info.dict_size)
