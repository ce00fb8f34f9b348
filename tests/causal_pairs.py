"""What tests of patching share: a crosscoder of the tiny pair, its chats, and a patch latent by latent."""

from pathlib import Path
from typing import Any

import torch
from conftest import Pair
from torch import Tensor

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig
from crosscoders.models.pair import inspect_pair
from crosscoders.text.chats import read_chats

POST = "blocks.1.hook_resid_post"


def uneven_crosscoder(cache_folder: Path) -> Crosscoder:
    """Random weights, another scale and mean for each model, decoders that differ; nothing here needs training."""
    cache, generator = ActivationCache(cache_folder), torch.Generator().manual_seed(0)
    made = Crosscoder(CrosscoderConfig(dict_size=24, k=4, d_model=cache.d_model)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=generator)
    made.W_dec += 0.3 * torch.randn(made.W_dec.shape, generator=generator)
    made.b_dec += 0.1 * torch.randn(made.b_dec.shape, generator=generator)
    made.input_scale.copy_(torch.tensor([1.5, 0.5]))
    made.input_mean.copy_(0.1 * torch.randn(made.input_mean.shape, generator=generator))
    made.threshold.fill_(0.2)
    return made


def cached_chats(pair: Pair, cache_folder: Path) -> list[Any]:
    """Six chats of the data that the cache was made of."""
    return read_chats(ActivationCache(cache_folder).config.data_config(), tokenizer_of(pair), 6)


def tokenizer_of(pair: Pair) -> Any:
    """The tokenizer of the tuned model, which has a chat template."""
    return inspect_pair(pair.base, pair.tuned, [POST]).tokenizer


def dense_patch(cc: Crosscoder, x: Tensor, latents: list[int], target: int) -> Tensor:
    """x_s + sum_j f_j (d_j^t / scale_t - d_j^s / scale_s), latent by latent."""
    f, source = cc.encode(x), 1 - target
    out = x[:, source].clone()
    for j in latents:
        out += f[:, j, None] * (
            cc.W_dec[j, target] / cc.input_scale[target] - cc.W_dec[j, source] / cc.input_scale[source]
        )
    return out
