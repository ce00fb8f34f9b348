"""Models that resume at a hook point: equal to full passes, at points of both kinds of model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_pairs import POST
from conftest import Pair, make_tokenizer
from torch import Tensor

from crosscoders import Crosscoder, CrosscoderConfig, InputError
from crosscoders.models import hooks, predictions
from crosscoders.models.pair import ModelPair, load_pair
from crosscoders.models.resume import ResumableModel
from crosscoders.text.padding import Batch
from crosscoders.training.feed import cache_inputs
from diffing import cli
from diffing.latents.table import latent_table, scale_cache, write_table

POINTS = (
    POST,
    "blocks.1.hook_resid_pre",
    "blocks.0.hook_resid_pre",
    "blocks.2.hook_resid_post",
    "blocks.1.hook_mlp_out",
)
IDS = torch.tensor([[2, 10, 20, 30, 44], [2, 40, 50, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
BATCH = Batch(IDS, MASK, MASK.bool(), np.arange(2))


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POST, whole=True)


def test_kl_and_ce_equal_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=generator) * 3 for _ in range(2))
    ids = torch.tensor([0, 6, 3, 3, 1])
    log_p, log_q = predictions.log_probs(p), predictions.log_probs(q)
    by_torch = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(predictions.kl(log_p, log_q), by_torch)
    torch.testing.assert_close(predictions.ce(log_q, ids), torch.nn.functional.cross_entropy(q, ids, reduction="none"))
    assert (predictions.kl(log_p, log_p) == 0).all() and (predictions.kl(log_p, log_q) > 0).all()
    assert predictions.log_probs(p.bfloat16()).dtype == torch.float32


def effect_of_hook(model: ResumableModel, state: Any, patched: torch.Tensor, hooked: Any, handle: Any) -> float:
    """Largest change of a logit by the hook, after checking that `model` patched in the same way agrees with it."""
    with torch.no_grad():
        expected = hooked(input_ids=IDS, attention_mask=MASK).logits
        handle.remove()
        unpatched = hooked(input_ids=IDS, attention_mask=MASK).logits
    real = MASK.bool()
    torch.testing.assert_close(model.logits(state.final[real]), unpatched[real], rtol=1e-4, atol=1e-5)
    found = model.logits(model.resume(state, patched)[real])
    torch.testing.assert_close(found, expected[real], rtol=1e-4, atol=1e-5)
    return float((expected - unpatched)[real].abs().max())


@pytest.mark.parametrize("point", POINTS)
def test_resumed_models_equal_a_full_forward_with_a_handwritten_hook(pair: Pair, point: str) -> None:
    from transformers import AutoModelForCausalLM

    model = ResumableModel(load_pair(pair.base, pair.tuned, point, whole=True).models[1], point)
    assert model.prefix
    state = model.run(BATCH)
    patched = state.activation + torch.randn(state.activation.shape, generator=torch.Generator().manual_seed(1))

    plain = AutoModelForCausalLM.from_pretrained(pair.tuned)
    layer = plain.model.layers[int(point.split(".")[1])]
    if point.endswith("pre"):
        handle = layer.register_forward_pre_hook(lambda _m, args: (patched, *args[1:]))
    elif point.endswith("mlp_out"):
        handle = layer.post_feedforward_layernorm.register_forward_hook(lambda *_: patched)
    else:
        handle = layer.register_forward_hook(lambda *_: patched)
    assert effect_of_hook(model, state, patched, plain, handle) > 1e-2
    assert torch.equal(model.resume(state, state.activation), state.final)


def test_a_model_whose_layers_cannot_be_left_out_gives_the_same_by_full_passes(whole: ModelPair) -> None:
    fast, slow = (ResumableModel(whole.models[1], POST) for _ in range(2))
    slow.prefix = None
    state = fast.run(BATCH)
    assert torch.equal(fast.resume(state, state.activation * 2), slow.resume(state, state.activation * 2))


def test_an_architecture_in_which_skipping_is_wrong_is_noticed(whole: ModelPair) -> None:
    model = whole.models[1]
    kept: list[Tensor] = []
    lower = model.model.layers[0].register_forward_hook(lambda _m, args, out: kept.append(out - args[0]))
    upper = model.model.layers[2].register_forward_hook(lambda _m, _a, out: out + kept[-1])  # reads a layer below
    try:
        assert ResumableModel(model, POST).prefix is None
    finally:
        lower.remove()
        upper.remove()
    assert ResumableModel(model, POST).prefix


def other_pair(folder: Path, config: Any) -> tuple[str, str]:
    """Folders of a base and a tuned model of an architecture without a fast path for its MLP."""
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder / name)
        make_tokenizer(folder / name)
    return str(folder / "base"), str(folder / "tuned")


def opt_config() -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=320, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=128, bos_token_id=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


@pytest.mark.parametrize("point", ["attn.hook_z", "hook_attn_out", "hook_mlp_out", "mlp.hook_pre"])
def test_points_of_the_bridge_resume_as_a_full_forward_with_a_handwritten_hook(tmp_path: Path, point: str) -> None:
    """OPT: its MLP has all tokens of a batch in one axis."""
    from transformers import AutoModelForCausalLM

    base, tuned = other_pair(tmp_path, opt_config())
    loaded = load_pair(base, tuned, f"blocks.1.{point}", whole=True)
    model = ResumableModel(loaded.models[1], f"blocks.1.{point}")
    assert model.prefix
    state = model.run(BATCH)
    patched = state.activation + torch.randn(state.activation.shape, generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(tuned).eval()
    layer = plain.model.decoder.layers[1]
    names = {"hook_mlp_out": "fc2", "mlp.hook_pre": "fc1"}
    module = layer.get_submodule(names.get(point, "self_attn.out_proj"))
    if point == "attn.hook_z":  # the input of the projection
        handle = module.register_forward_pre_hook(lambda _m, args: (patched.reshape(args[0].shape), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _m, _a, out: patched.reshape(out.shape))
    assert effect_of_hook(model, state, patched, plain, handle) > 1e-3


def test_points_without_a_vector_for_each_token_are_one_line(pair: Pair) -> None:
    point = "blocks.1.attn.hook_pattern"
    model = load_pair(pair.base, pair.tuned, point, whole=True).models[0]
    with pytest.raises(InputError, match=r"of shape \(1, 2, 8, 8\) for tokens .* expected one vector for each token"):
        ResumableModel(model, point)
    with pytest.raises(InputError, match="did not fire"):
        ResumableModel(model, "blocks.1.hook_mlp_in")


def test_causal_runs_at_a_point_of_the_bridge_in_another_architecture(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders import CacheConfig, cache_activations

    base, tuned = other_pair(tmp_path, opt_config())
    point = "blocks.1.hook_mlp_out"
    config: CacheConfig = pair.config(tmp_path / "cache", base=base, tuned=tuned, hook_point=point, n_tokens=400)
    cache = cache_activations(config)
    made = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    made.W_dec += 0.3 * torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(1))
    made.save(tmp_path / "run", provenance=cache_inputs(cache))
    scales, contexts, _ = scale_cache(made, cache)
    table = latent_table(made, scales, contexts)
    table.to_parquet(tmp_path / "run" / "latents.parquet")
    write_table(tmp_path / "run", table, scales, cache)
    argv = ["causal", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--n-documents", "20"]
    argv += ["--n-latents", "2", "--random-draws", "2", "--json"]
    found = []
    for rows_at_once in ("1", "4"):
        assert cli.main([*argv, "--batch-rows", rows_at_once]) == 0
        found.append({row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]})
    assert found[0]["causal.base_to_tuned.none.kl"] > 1e-5
    for name, value in found[0].items():
        if name.endswith(".kl"):
            assert found[1][name] == pytest.approx(value, rel=2e-3, abs=1e-7), name


def test_bypassed_layers_are_back_after_an_error(whole: ModelPair) -> None:
    model = whole.models[0]
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(RuntimeError), hooks.bypass(model, 2):
            assert not torch.equal(model(IDS).logits, before)
            raise RuntimeError
        assert torch.equal(model(IDS).logits, before)
    assert not any("forward" in vars(layer) for layer in hooks.decoder_layers(model))
