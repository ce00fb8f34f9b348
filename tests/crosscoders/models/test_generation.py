"""Greedy means the likeliest token each time, whatever the model's folder says."""

from typing import Any

import pytest
import torch
from conftest import Pair
from transformers import GenerationConfig

from crosscoders.models.generation import greedy
from crosscoders.models.pair import load_pair
from diffing.causal.steering import answer


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 5.0, "top_p": 0.5},
        {"forced_bos_token_id": 9, "suppress_tokens": list(range(20, 200))},
    ],
)
def test_generation_settings_of_a_folder_do_not_change_greedy_answers(pair: Pair, settings: dict[str, Any]) -> None:
    loaded = load_pair(pair.base, pair.tuned, "blocks.1.hook_resid_post", whole=True)
    model: Any = loaded.models[1]
    ids = torch.tensor([[2, 10, 20, 10, 20]])
    expected = ids
    with torch.no_grad():
        for _ in range(16):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(dim=-1)], dim=1)
    own = model.generation_config = GenerationConfig(**settings, eos_token_id=[1, 4], pad_token_id=0)
    mask = torch.ones_like(ids)
    torch.manual_seed(0)
    leaked = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    with greedy(model):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=16)
        assert model.generation_config.eos_token_id == [1, 4]
    assert found.tolist() == expected.tolist()
    assert model.generation_config is own
    if "do_sample" not in settings:
        assert leaked.tolist() != expected.tolist()  # so there was something to leak
    text = answer(model, loaded.info.tokenizer, "Return the sum.", max_new_tokens=12)
    model.generation_config = GenerationConfig(eos_token_id=[1, 4], pad_token_id=0)
    assert text == answer(model, loaded.info.tokenizer, "Return the sum.", max_new_tokens=12) != ""
