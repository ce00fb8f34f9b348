"""Hook points of attention and MLP on a Hugging Face model: what the TransformerBridge has there, in every listed
architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_tokenizer

from crosscoders import InputError
from crosscoders.models import hooks, points
from crosscoders.models.points import PARTS

SIZES = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1}
CONFIGS: dict[str, Any] = {
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, head_dim=12, sliding_window=16),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=12, sliding_window=16),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=12),
    "gpt2": lambda: hf.GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES),
}


def bumped(x: torch.Tensor) -> torch.Tensor:
    return x + torch.arange(x.shape[-1])  # a constant would vanish in a layer norm


IDS = torch.tensor([[2, 7, 8, 9, 10], [2, 5, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_every_listed_architecture_is_tested() -> None:
    assert CONFIGS.keys() == PARTS.keys()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_hugging_face_model_has_what_the_bridge_has(kind: str, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    made = hf.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for weight in made.parameters():  # norms start as identities
            weight.add_(0.1 * torch.randn_like(weight))
    made.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config.model_type == kind
    inner = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=inner, tokenizer=hf.AutoTokenizer.from_pretrained(tmp_path), device="cpu"
    )
    names = [f"blocks.1.{name}" for name in PARTS[kind]]
    found, wanted = (hooks.run_to(model, names, IDS, MASK) for model in (plain, bridge))
    for point in names:
        torch.testing.assert_close(found[point], wanted[point])
        assert found[point].shape == (2, 5, points.width(plain.config, point))
        with (
            torch.no_grad(),
            hooks.replace(plain, point, bumped),
            hooks.replace(bridge, point, bumped),
        ):
            edited = plain(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
            bridged = bridge(IDS, attention_mask=MASK, return_type="logits")[MASK.bool()]
        torch.testing.assert_close(edited, bridged, rtol=1e-4, atol=1e-4)
        unedited = plain(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        assert float((edited - unedited).detach().abs().max()) > 1e-3


def test_an_architecture_that_scales_its_outputs_needs_the_bridge() -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.GraniteConfig(**GROUPED, residual_multiplier=0.2))
    with pytest.raises(InputError, match=r"needs a TransformerBridge; GraniteForCausalLM has hook_resid_pre"):
        hooks.find_module(model, "blocks.1.hook_mlp_out")
    with pytest.raises(InputError, match="layers 0 to 1"):
        hooks.find_module(model, "blocks.2.hook_mlp_out")


def test_points_sort_in_the_order_in_which_a_pass_reaches_them() -> None:
    kinds = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "mlp.hook_in", "hook_mlp_out", "hook_resid_post"]
    names = [f"blocks.{layer}.{kind}" for layer in (2, 10) for kind in kinds]
    assert sorted(reversed(names), key=points.place) == names
    assert points.entry_point("blocks.2.hook_mlp_out") == "blocks.2.hook_resid_pre"
    assert points.entry_point("blocks.2.hook_resid_post") == "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"),
        ("block.1.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("resid_post", "blocks.2.hook_resid_post"),
        ("3", "blocks.3.hook_resid_post"),
        ("model.layers.1.mlp", "blocks.1.hook_mlp_out"),
        ("blocks.0.attn.hook_Z", "blocks.0.attn.hook_z"),
    ],
)
def test_the_nearest_name_is_the_one_that_was_meant(typed: str, meant: str) -> None:
    kinds = points.plain_kinds("llama")
    assert points.nearest_point(typed, kinds, 4, "llama") == f"; did you mean {meant!r}?"
