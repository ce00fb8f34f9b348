"""TopKLoRA's layer: what it computes, on and off, saved and loaded, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosscoders import CorruptData, InputError
from sae_lora.lora.layer import SparseLoRA
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.topk import WEIGHTS, TopKLoRA

IDS = torch.tensor([[2, 7, 8, 9, 10, 11], [2, 30, 31, 32, 33, 34]])
Make = Callable[..., Any]


@pytest.fixture
def make() -> Make:
    """Random Gemma-2 models of two layers."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    def build(seed: int = 0, tied: bool = True, width: int = 16) -> Any:
        torch.manual_seed(seed)
        config = Gemma2Config(
            vocab_size=40, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=tied,
        )  # fmt: skip
        return Gemma2ForCausalLM(config).eval()

    return build


def randomised(adapter: TopKLoRA, seed: int = 1) -> TopKLoRA:
    """The adapter with random write directions."""
    g = torch.Generator().manual_seed(seed)
    for site in adapter.sites.values():
        nn.init.normal_(site.W_out, std=0.1, generator=g)
    return adapter


def layer(gate: str, k: int | None, seed: int = 0) -> SparseLoRA:
    site = SparseLoRA("x", 6, 5, rank=8, k=k, gate=gate, scale=1.5)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    site.init_weights_(1.0, g)
    nn.init.normal_(site.W_out, generator=g)
    return site.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_exactly_k_directions_are_used_and_they_are_the_largest() -> None:
    site, x = layer("topk", 3), torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(3)) + 1.0
    a, z = site.activations(x), x @ site.A.T
    for row, pre in zip(a.view(-1, 8), z.view(-1, 8), strict=True):
        largest = sorted((v for v in pre.tolist() if v > 0), reverse=True)[:3]
        assert sorted((v for v in row.tolist() if v != 0), reverse=True) == pytest.approx(largest, abs=1e-6)


@pytest.mark.parametrize(("gate", "k"), [("topk", 3), ("relu", None), ("none", None)])
def test_the_output_is_that_of_a_dense_formula(gate: str, k: int | None) -> None:
    site, x = layer(gate, k), torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(3))
    z = torch.einsum("bsi,ri->bsr", x, site.A)
    if gate != "none":
        z = z.clamp_min(0)
    if k is not None:
        cut = z.sort(dim=-1, descending=True).values[..., k - 1 : k]
        z = z * (z >= cut)
    torch.testing.assert_close(site.delta(x), 1.5 * torch.einsum("bsr,or->bso", z, site.B))


def test_only_selected_directions_get_a_gradient() -> None:
    site, x = layer("topk", 2), torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(4))
    site.delta(x).square().sum().backward()
    used = site.activations(x)[0, 0] > 0
    assert used.sum() == 2 and site.A.grad is not None and site.W_out.grad is not None
    for grad in (site.A.grad, site.W_out.grad):
        assert torch.equal(grad.abs().sum(dim=1) > 0, used)


def test_straight_through_changes_the_gradient_and_not_the_output() -> None:
    plain, other = layer("topk", 2), layer("topk", 2)
    other.estimator = "straight-through"
    x = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(plain.delta(x), other.delta(x))
    for site in (plain, other):
        site.delta(x).square().sum().backward()
    assert not torch.allclose(plain.A.grad, other.A.grad)  # type: ignore[arg-type]


def test_batchtopk_shares_k_among_the_tokens_of_a_batch_and_evaluates_by_a_threshold() -> None:
    site, x = layer("batchtopk", 2).train(), torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(6))
    a = site.activations(x)
    assert int((a > 0).sum()) == 100 and int((a > 0).sum(dim=-1).max()) > 2
    site.eval()
    assert site.threshold == a[a > 0].min()
    site.threshold *= 0.9999  # the smallest is in, however it is rounded
    alone = torch.cat([site.activations(x[:, i : i + 1]) for i in range(50)], dim=1)  # no token depends on another
    torch.testing.assert_close(alone, a)


def test_an_adapter_changes_nothing_until_it_is_trained_nor_when_it_is_off(make: Make) -> None:
    model = make()
    before = logits(model)
    adapter = TopKLoRA.attach(model, TopKLoRAConfig(rank=8, k=2, embedding=True))
    torch.testing.assert_close(logits(model), before)
    randomised(adapter)
    assert not torch.allclose(logits(model), before)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    off = {name: torch.zeros(8) for name in adapter.sites}
    with adapter.multiplied(off):
        torch.testing.assert_close(logits(model), before)
    adapter.detach()
    assert torch.equal(logits(model), before)


def test_without_a_gate_it_is_peft_s_lora(make: Make) -> None:
    import peft

    model, other = make(), make()
    adapter = randomised(TopKLoRA.attach(model, TopKLoRAConfig(rank=4, k=None, gate="none", alpha=6)))
    names = sorted({name.rsplit(".", 1)[-1] for name in adapter.sites})
    theirs = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)).eval()
    modules = dict(theirs.named_modules())
    for name, site in adapter.sites.items():
        module = modules[f"base_model.model.{name}"]
        module.lora_A["default"].weight.data.copy_(site.A)
        module.lora_B["default"].weight.data.copy_(site.B)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_on_the_embedding_it_is_a_changed_table(make: Make, tied: bool) -> None:
    model, other = make(tied=tied), make(tied=tied)
    adapter = randomised(TopKLoRA.attach(model, TopKLoRAConfig(rank=8, k=2, embedding=True, modules=["q_proj"])))
    for site in adapter.sites.values():
        if not site.name.endswith("embed_tokens"):
            nn.init.zeros_(site.W_out)
    (table,) = (site for name, site in adapter.sites.items() if name.endswith("embed_tokens"))
    rows = table.scale * table.activations(torch.arange(40)) @ table.W_out
    with torch.no_grad():
        other.get_input_embeddings().weight += rows  # the head too, where it is tied
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)


def test_several_adapters_add_up(make: Make) -> None:
    model = make()
    config = TopKLoRAConfig(rank=4, k=None, gate="none", modules=["down_proj"], layers=[1])
    one, two = (randomised(TopKLoRA.attach(model, config), seed) for seed in (1, 2))
    x = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(0))
    module = dict(model.named_modules())["model.layers.1.mlp.down_proj"]
    deltas = [next(iter(adapter.sites.values())).delta(x) for adapter in (one, two)]
    with one.disabled(), two.disabled():
        plain = module(x)
    torch.testing.assert_close(module(x), plain + deltas[0] + deltas[1])


def test_saved_and_loaded_it_is_the_same_bit_for_bit(make: Make, tmp_path: Path) -> None:
    model = make()
    adapter = randomised(TopKLoRA.attach(model, TopKLoRAConfig(rank=8, k=2, embedding=True)))
    adapter.set_progress(0.1)  # k is still above its last value
    adapter.save(tmp_path)
    again = make()
    loaded = TopKLoRA.load(again, tmp_path / ".")
    assert loaded.k_now == adapter.k_now == 3
    assert torch.equal(logits(again), logits(model))


def test_a_sparse_branch_beside_an_mlp_reads_its_input_and_adds_to_its_output(make: Make) -> None:
    model = make()
    mlp, x = model.model.layers[1].mlp, torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    plain = mlp(x)
    adapter = randomised(TopKLoRA.attach(model, TopKLoRAConfig(rank=8, k=2, layers=[1], modules=["mlp"], alpha=12)))
    (site,) = adapter.sites.values()
    z = (x @ site.A.T).clamp_min(0)
    z = z * (z >= z.sort(dim=-1, descending=True).values[..., 1:2])
    torch.testing.assert_close(mlp(x), plain + 1.5 * z @ site.W_out)


def test_k_falls_linearly_to_its_last_value() -> None:
    config = TopKLoRAConfig(rank=64, k=8)
    assert [config.k_at(f) for f in (0, 0.1, 0.2, 1)] == [16, 12, 8, 8]


def test_dead_directions_are_counted_and_drawn_anew() -> None:
    site = layer("topk", 2).train()
    with torch.no_grad():
        site.A[3] = 0  # never above the others
    x = torch.randn(1, 200, 6, generator=torch.Generator().manual_seed(7)).abs()
    site.delta(x)
    assert bool(site.dead(200)[3])
    n = int(site.dead(200).sum())
    assert site.revive_(200, torch.Generator().manual_seed(0)) == n
    assert site.A[3].norm() > 0 and not site.W_out[3].any() and not site.dead(1)[3]


def test_plain_peft_refuses_the_folder(make: Make, tmp_path: Path) -> None:
    import peft

    TopKLoRA.attach(make(), TopKLoRAConfig(rank=4, k=2)).save(tmp_path)
    with pytest.raises(KeyError, match="TOPKLORA"):
        peft.PeftModel.from_pretrained(make(), tmp_path)


def test_what_is_wrong_is_one_line(make: Make, tmp_path: Path) -> None:
    for settings, words in (
        ({"rank": 4, "k": 5}, "k is 5 but rank is 4"),
        ({"rank": 0}, "rank is 0"),
        ({"gate": "relu", "k": 4}, "k has no effect"),
        ({"k": None}, "needs k"),
    ):
        with pytest.raises(InputError, match=words):
            TopKLoRAConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layer 2 is not there"):
        TopKLoRA.attach(make(), TopKLoRAConfig(rank=4, k=2, layers=[2]))
    with pytest.raises(InputError, match="no linear map is called 'c_attn'"):
        TopKLoRA.attach(make(), TopKLoRAConfig(rank=4, k=2, modules=["c_attn"]))
    adapter = TopKLoRA.attach(make(), TopKLoRAConfig(rank=4, k=2))
    with pytest.raises(InputError, match="cannot be merged"):
        adapter.merge()
    with pytest.raises(InputError, match="holds no TopKLoRA"):
        TopKLoRA.load(make(), tmp_path)
    adapter.save(tmp_path)
    wide = make(width=32)
    with pytest.raises(InputError, match="is for another model"):
        TopKLoRA.load(wide, tmp_path)
    assert torch.equal(logits(wide), logits(make(width=32)))  # nothing of it stays
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(CorruptData, match="checksum"):
        TopKLoRA.load(make(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TOPKLORA"
