"""Pair and hooks: the same numbers by every route, and what is refused before weights load."""

from pathlib import Path

import pytest
import torch
from conftest import Pair, make_model, make_tokenizer

from crosscoders import CacheConfig, EnvironmentFault, InputError, load_pair
from crosscoders.models.hooks import capture, replace, run_to
from crosscoders.models.pair import inspect_pair

POST = "blocks.1.hook_resid_post"


def refuse(config: CacheConfig, match: str) -> None:
    from crosscoders import cache_activations

    with pytest.raises(InputError, match=match):
        cache_activations(config)


def test_the_truncated_model_and_transformer_bridge_are_bit_equal(pair: Pair) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    fast = load_pair(pair.base, pair.tuned, POST)
    ids = torch.tensor([[2, 10, 20, 30], [2, 40, 50, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    for model, name in zip(fast.models, (pair.base, pair.tuned), strict=True):
        assert len(model.layers) == 2  # the third layer was never loaded
        bridge = TransformerBridge.boot_transformers(name, device="cpu", dtype=torch.float32)
        for point in (POST, "blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"):
            assert torch.equal(run_to(model, [point], ids, mask)[point], run_to(bridge, [point], ids, mask)[point])
        _, cached = bridge.run_with_cache(ids, attention_mask=mask, names_filter=POST)
        assert torch.equal(run_to(model, [POST], ids, mask)[POST], cached[POST])


def test_a_general_hook_point_goes_through_transformer_bridge(pair: Pair) -> None:
    from transformers import AutoModelForCausalLM

    point = "blocks.1.hook_mlp_out"
    loaded = load_pair(pair.base, pair.tuned, point)
    ids = torch.tensor([[2, 10, 20, 30]])
    found = run_to(loaded.models[1], [point], ids, torch.ones_like(ids))[point]
    model = AutoModelForCausalLM.from_pretrained(pair.tuned)
    seen = {}
    model.model.layers[1].post_feedforward_layernorm.register_forward_hook(lambda m, a, out: seen.update(x=out))
    with torch.no_grad():
        model(ids)
    assert found.shape == (1, 4, 16)
    torch.testing.assert_close(found, seen["x"], rtol=1e-5, atol=1e-6)


def test_a_peft_adapter_as_the_tuned_model_equals_its_merged_model(pair: Pair, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(pair.base)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    make_tokenizer(tmp_path / "merged")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    ids = torch.tensor([[2, 10, 20, 30]])
    by_adapter = load_pair(pair.base, str(tmp_path / "adapter"), POST)
    by_merge = load_pair(pair.base, str(tmp_path / "merged"), POST)
    seen = [run_to(p.models[1], [POST], ids, torch.ones_like(ids))[POST] for p in (by_adapter, by_merge)]
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    plain = run_to(by_adapter.models[0], [POST], ids, torch.ones_like(ids))[POST]
    assert (seen[0] - plain).abs().max() > 1e-3
    with pytest.raises(InputError, match=r"is an adapter: .* one pass cannot give both. Cache them in two runs"):
        load_pair(pair.base, str(tmp_path / "adapter"), [POST, "blocks.1.hook_mlp_out"])


def test_capture_and_replace_leave_no_hook_behind_even_after_an_error(pair: Pair) -> None:
    model = load_pair(pair.base, pair.tuned, POST).models[0]
    ids = torch.tensor([[2, 10, 20]])
    before = model(ids).last_hidden_state
    with (
        replace(model, "blocks.0.hook_resid_post", torch.zeros_like),
        capture(model, ["blocks.0.hook_resid_post"]) as seen,
    ):
        model(ids)
    assert (seen["blocks.0.hook_resid_post"] == 0).all()  # replace was registered first, so capture sees its output
    with pytest.raises(RuntimeError), replace(model, POST, lambda x: x), capture(model, [POST]):
        raise RuntimeError
    assert torch.equal(model(ids).last_hidden_state, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_unequal_widths_are_refused_before_weights_load(pair: Pair, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "wide")
    make_model(tmp_path / "wide", seed=0, d_model=32)
    (tmp_path / "wide" / "model.safetensors").unlink()
    refuse(pair.config(tmp_path / "c", tuned=str(tmp_path / "wide")), r"has d_model 16 but tuned .* has 32. Choose two")


def test_a_layer_out_of_range_is_refused(pair: Pair, tmp_path: Path) -> None:
    refuse(pair.config(tmp_path / "c", hook_point="blocks.3.hook_resid_post"), "has layers 0 to 2. Use 'blocks.1.hook")
    refuse(
        pair.config(tmp_path / "c", hook_point="resid_post"), "has no layer; did you mean 'blocks.1.hook_resid_post'?"
    )
    refuse(
        pair.config(tmp_path / "c", hook_point="blocks.1.hook_nothing"),
        "is not in this model; did you mean 'blocks.1.hook",
    )
    refuse(pair.config(tmp_path / "c", hook_point="blocks.1.hook_mlp_ot"), "did you mean 'blocks.1.hook_mlp_out'?")


def test_tokenizers_that_differ_are_refused(pair: Pair, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other", words=["entirely different words here"] * 3)
    make_model(tmp_path / "other", seed=1)
    refuse(pair.config(tmp_path / "c", tuned=str(tmp_path / "other")), "the tokenizers differ: token .* has id")


def test_a_model_that_is_not_there_or_a_pointer_is_refused(pair: Pair, tmp_path: Path) -> None:
    refuse(pair.config(tmp_path / "c", base="/no/such/model"), "model folder '/no/such/model' does not exist")
    refuse(pair.config(tmp_path / "c", base="nobody/nothing"), "no config for model 'nobody/nothing'")
    make_tokenizer(tmp_path / "lfs")
    make_model(tmp_path / "lfs", seed=1)
    (tmp_path / "lfs" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refuse(pair.config(tmp_path / "c", tuned=str(tmp_path / "lfs")), "is a git-lfs pointer, not the file itself")


def test_a_device_that_is_not_there_is_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="device 'tpu9' is unknown"):
        load_pair(pair.base, pair.tuned, POST, device="tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentFault, match="device 'cuda:7' is not there: this machine has 0 GPUs"):
            load_pair(pair.base, pair.tuned, POST, device="cuda:7")


def test_weights_that_are_cut_off_and_ids_beyond_the_embedding_are_refused(pair: Pair, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    from crosscoders import CorruptData, cache_activations

    shutil.copytree(pair.tuned, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CorruptData, match=r"the weights of .* are damaged"):
        cache_activations(pair.config(tmp_path / "c", tuned=str(tmp_path / "cut")))
    larger = AutoTokenizer.from_pretrained(pair.tuned)
    larger.add_tokens(["<one>", "<two>"])
    larger.save_pretrained(tmp_path / "larger")
    (tmp_path / "d.jsonl").write_text('{"text": "Return <two>"}\n' * 200)
    refuse(
        pair.config(tmp_path / "d", tokenizer=str(tmp_path / "larger"), data=str(tmp_path / "d.jsonl")),
        r"holds token '<two>' with id 321, but the ids of .*base' end at 319. Name the tokenizer that fits",
    )


@pytest.mark.parametrize(
    "name, match",
    [
        ("./runs/x", r"model folder './runs/x' does not exist. Check the path"),
        ("a/b/c", r"model folder 'a/b/c' does not exist"),
        ("runs/x/", r"model folder 'runs/x/' does not exist"),
        ("my runs/x y", r"'my runs' is a folder here and has no model folder 'x y'"),
        ("runs/x", r"'runs' is a folder here and has no model folder 'x'. Check the path; for the hub's"),
    ],
)
def test_a_mistyped_path_is_refused_without_asking_the_hub(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, match: str
) -> None:
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "cached_file", lambda *a, **k: pytest.fail("the hub was asked"))
    monkeypatch.setattr("crosscoders.models.pair.load_auto", lambda *a, **k: pytest.fail("the hub was asked"))
    for folder in ("runs", "my runs"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    for base, tuned, tokenizer in ((name, pair.tuned, None), (pair.base, name, None), (pair.base, pair.tuned, name)):
        with pytest.raises(InputError, match=match):
            inspect_pair(base, tuned, [POST], tokenizer=tokenizer)


def test_a_hub_repository_in_the_local_store_is_no_lost_path(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "google").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "/somewhere/config.json")
    with pytest.raises(InputError, match="no config for model 'google/gemma"):  # it goes on to ask the library
        inspect_pair("google/gemma", pair.tuned, [POST])
