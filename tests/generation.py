"""Logits of a greedy answer, as it is generated and as one pass over the whole text gives them."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def stepwise_and_whole(
    model: Any, ids: Tensor, mask: Tensor, n_tokens: int, *, use_cache: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits of `n_tokens` generated positions by either route, (rows, n_tokens, vocab).

    Both are of the same tokens: greedy texts of random weights would differ where two logits are nearly equal.
    """
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0,
                "use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    out = model.generate(ids, attention_mask=mask, **settings)
    mask = torch.cat([mask, torch.ones(len(ids), n_tokens, dtype=mask.dtype)], dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    whole = model(input_ids=out.sequences, attention_mask=mask, position_ids=places, use_cache=False).logits
    return torch.stack(out.logits, dim=1), whole[:, -n_tokens - 1 : -1]
