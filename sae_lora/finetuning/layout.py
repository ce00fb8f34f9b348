"""A frozen dictionary as an SAE of SAELens with the same numbers: to train it, and to save it in SAELens's layout."""

import copy
from typing import Any

import torch
from torch import Tensor

from crosscoders.common.errors import InputError
from sae_lora.dictionaries.frozen import CrosscoderSide, DictionaryInfo, FrozenDictionary, Sae, SaeLens

_NAMES = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


def as_sae_lens(dictionary: FrozenDictionary) -> SaeLens:
    """Return a copy of a dictionary as an SAE of SAELens, float32.

    Raises:
        InputError: it is no SAE of one model.
    """
    if isinstance(dictionary, SaeLens):
        return _wrapped(dictionary.info, copy.deepcopy(dictionary.sae).float())
    tensors = _tensors(dictionary)
    if tensors is None:
        raise InputError(
            f"{dictionary.info.path!r} is not an SAE of one model, so SAELens has no layout for it. Give an SAE."
        )
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    info = dictionary.info
    sae: Any = JumpReLUSAE(JumpReLUSAEConfig(d_in=info.d_model, d_sae=info.dict_size, apply_b_dec_to_input=False))
    sae.load_state_dict({name: value.detach().float().cpu() for name, value in tensors.items()})
    return _wrapped(info, sae)


def _wrapped(info: DictionaryInfo, sae: Any) -> SaeLens:
    sae.cfg.dtype = "float32"
    sae.cfg.metadata.hook_name = info.hook_point
    return SaeLens(info, sae)


def _tensors(dictionary: FrozenDictionary) -> dict[str, Tensor] | None:
    if isinstance(dictionary, Sae):
        settings = dictionary.info.settings
        if settings["gate"] != "jumprelu" or settings.get("apply_b_dec_to_input"):
            return None
        tensors: dict[str, Tensor] = dict(dictionary.named_parameters())
        return tensors if tensors.keys() == _NAMES else None
    if isinstance(dictionary, CrosscoderSide) and dictionary.crosscoder.config.n_models == 1:
        folded = dictionary.crosscoder.fold()
        return {
            "W_enc": folded.W_enc[0],
            "b_enc": folded.b_enc,
            "W_dec": folded.W_dec[:, 0],
            "b_dec": folded.b_dec[0],
            # A latent that never fires has the gate inf, which files keep and JSON need not.
            "threshold": torch.as_tensor(folded.gate_at()),
        }
    return None
