"""Which weights LoRA goes to: Conv1D and experts too, never a vision tower; the count equals what is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from crosscoders import InputError
from crosscoders.models.adapters import with_adapter
from crosscoders.models.loading import load_model
from sae_lora.lora.adapter import add_lora, lora_off
from sae_lora.lora.targets import find_targets

IDS = torch.tensor([[2, 10, 20, 30]])
TEXT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2))


def causal(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config)


def qwen3_moe() -> Any:
    return causal(transformers.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20))


def mixtral() -> Any:
    return causal(transformers.MixtralConfig(**TEXT, num_local_experts=4))


def gpt_oss() -> Any:
    return causal(transformers.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def gemma3() -> Any:
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 8}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=59)
    )


EXPERTS = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
# Of one layer at rank 2, by hand. GPT-2: 16 -> 48, 16 -> 16, 16 -> 64, 64 -> 16. Attention of the others: 16 -> 16,
# 16 -> 8 twice, 16 -> 16: 2 * 112 = 224. Four experts of width w: 4 * 2 * ((16 + 2w) + (w + 16)) = 8 * (32 + 3w).
# Gemma-3's MLP: three maps between 16 and 24.
COUNTS = [
    (gpt2, [], 2 * (64 + 32 + 80 + 80)),
    (qwen3_moe, EXPERTS, 224 + 8 * (32 + 60)),
    (mixtral, EXPERTS, 224 + 8 * (32 + 72)),
    (gpt_oss, EXPERTS, 224 + 8 * (32 + 72)),
    (gemma3, [], 224 + 2 * 3 * 40),
]


@pytest.mark.parametrize("make, experts, n_weights", COUNTS)
def test_lora_goes_to_every_linear_map_of_a_layer_and_is_saved_whole(
    tmp_path: Path, make: Callable[[], Any], experts: list[str], n_weights: int
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    plain = model(input_ids=IDS).logits.detach()
    assert find_targets(model, [1]).parameters == experts and find_targets(model, [1]).n_weights(2) == n_weights
    adapted = add_lora(model, [1], rank=2, alpha=4)
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert sum(weight.numel() for weight in trained.values()) == n_weights
    assert not any("vision" in name or ".0." in name.split("lora_")[0].replace("experts.0", "") for name in trained)
    assert torch.equal(adapted(input_ids=IDS).logits, plain)
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.1 * torch.randn_like(weight))
    moved = adapted(input_ids=IDS).logits.detach()
    assert (moved - plain).abs().max() > 1e-3
    with lora_off(adapted):
        assert torch.equal(adapted(input_ids=IDS).logits, plain)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = with_adapter(load_model(str(tmp_path / "model"), torch.float32), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, moved, rtol=1e-5, atol=1e-6)


def test_dropout_on_experts_is_refused() -> None:
    with pytest.raises(InputError, match=r"dropout = 0.1 has no meaning for LoRA on the weights of experts"):
        add_lora(mixtral(), [1], rank=2, alpha=4, dropout=0.1)
    assert add_lora(gpt2(), [1], rank=2, alpha=4, dropout=0.1).peft_config["default"].lora_dropout == 0.1
