"""Loading: every tensor of a checkpoint or adapter is accounted for; models that people have work or say why not."""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import Pair, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from crosscoders import CacheConfig, EnvironmentFault, InputError, cache_activations, load_pair
from crosscoders.models import hooks
from crosscoders.models.adapters import with_adapter
from crosscoders.models.limits import require_readable
from crosscoders.models.loading import load_model, require_whole
from crosscoders.models.names import hash_model
from crosscoders.models.pair import inspect_pair
from crosscoders.models.resume import ResumableModel, require_head
from crosscoders.text.tokens import Batch

POST = "blocks.1.hook_resid_post"
IDS = torch.tensor([[2, 10, 20, 30]])
LAYER = "model.layers.1."
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def renamed(old: str, new: str) -> Rename:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(part: str) -> Rename:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def prefixed(prefix: str) -> Rename:
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


def changed(source: str, folder: Path, change: Rename) -> str:
    """A copy of a model whose file holds other tensors."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def at(model: Any, hook_point: str = POST) -> Tensor:
    return hooks.run_to(model, [hook_point], IDS, torch.ones_like(IDS))[hook_point]


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "change, match",
    [
        (renamed("model.", "model.language_model."), r"of the model are not in the checkpoint .*embed_tokens"),
        (prefixed("transformer."), r"of the checkpoint are not in the model \(transformer.model.embed_tokens"),
        (without(f"{LAYER}mlp.down_proj"), r"1 tensors of the model are not in the checkpoint \(.*1.mlp.down_proj"),
        (without(LAYER), r"11 tensors of the model are not in the checkpoint"),
        (without("model.norm"), r"1 tensors of the model are not in the checkpoint \(.*norm.weight\)"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), r"q_proj.base_layer.weight"),
        (lambda old: {**old, f"{LAYER}mlp.down_proj.bias": torch.zeros(16)}, r"1 tensors of the checkpoint are not"),
        (lambda old: {**old, f"{LAYER}mlp.down_proj.weight": torch.zeros(16, 20)}, r"1 tensors have another shape"),
    ],
)
def test_a_checkpoint_with_missing_or_unknown_tensors_is_refused(
    pair: Pair, tmp_path: Path, change: Rename, match: str, whole: bool
) -> None:
    tuned = changed(pair.tuned, tmp_path / "tuned", change)
    with pytest.raises(InputError, match=rf"the weights of .*tuned' do not fit Gemma2.*{match}"):
        load_pair(pair.base, tuned, POST, whole=whole)


@pytest.mark.parametrize(
    "change", [prefixed("_orig_mod."), prefixed("module."), renamed("layers.0.", "layers.0._orig_mod.")]
)
def test_the_names_of_a_wrapper_are_read_without_it(pair: Pair, tmp_path: Path, change: Rename) -> None:
    wrapped = load_pair(pair.base, changed(pair.tuned, tmp_path / "tuned", change), POST).models[1]
    assert torch.equal(at(wrapped), at(load_pair(pair.base, pair.tuned, POST).models[1]))


def test_a_cut_off_model_may_leave_higher_layers_and_the_head_unread(pair: Pair, tmp_path: Path) -> None:
    def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "lm_head.weight": torch.zeros(320, 16), "model.layers.2.extra.weight": torch.zeros(2)}

    tuned = changed(pair.tuned, tmp_path / "tuned", with_head)
    loaded = load_pair(pair.base, tuned, POST).models[1]
    assert torch.equal(at(loaded), at(load_pair(pair.base, pair.tuned, POST).models[1]))
    with pytest.raises(InputError, match=r"model\.layers\.2\.extra\.weight"):
        load_pair(pair.base, tuned, POST, whole=True)


def test_every_command_that_loads_weights_refuses_them(pair: Pair, tmp_path: Path) -> None:
    from diffing.null.models import load_base
    from sae_lora.fitting.inputs import _pretrained
    from sae_lora.fitting.settings import TextConfig

    lost = changed(pair.base, tmp_path / "lost", without(f"{LAYER}mlp.down_proj"))
    for load in (
        lambda: load_base(lost, "auto"),
        lambda: _pretrained(lost, TextConfig(data="-"), torch.device("cpu")),
        lambda: load_pair(lost, pair.tuned, POST),
        lambda: load_pair(pair.base, lost, "blocks.1.hook_mlp_out"),
    ):
        with pytest.raises(InputError, match=r"1 tensors of the model are not in the checkpoint"):
            load()


def test_a_tuned_model_that_equals_the_base_is_refused_before_anything_is_cached(pair: Pair, tmp_path: Path) -> None:
    upper = changed(
        pair.base, tmp_path / "upper", lambda old: {**old, "model.layers.2.mlp.down_proj.weight": torch.ones(16, 24)}
    )
    texts = [json.dumps({"text": f"Return the {i} of it."}) for i in range(200)]
    (tmp_path / "d.jsonl").write_text("\n".join(texts))
    copied = changed(pair.base, tmp_path / "copied", dict)
    said = {
        pair.base: "are the same model",
        copied: "are the same model",
        upper: "has the same activations as the base",
    }
    for number, tuned in enumerate(said):
        out = tmp_path / f"c{number}"
        with pytest.raises(InputError, match=said[tuned]):
            cache_activations(pair.config(out, tuned=tuned, data=str(tmp_path / "d.jsonl")))
        assert not list(out.rglob("*.safetensors"))
    deeper = pair.config(
        tmp_path / "c3", tuned=upper, data=str(tmp_path / "d.jsonl"), hook_point="blocks.2.hook_resid_post"
    )
    assert len(cache_activations(deeper)) == 600


# --------------------------------------------------------------------------------------------------------- adapters


def save_adapter(base: str, folder: Path, config: peft.PeftConfig, *, n_tokens: int | None = None) -> Any:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if n_tokens is not None:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's words on saving embeddings
        wrapped = peft.get_peft_model(model, config).eval()
        wrapped.save_pretrained(folder)
    return wrapped


def lora(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | changes
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize(
    "change, match",
    [
        (renamed("model.model.layers", "model.model.language_model.layers"), r"12 tensors of its file are not in the"),
        (without("layers.1."), r"4 tensors that its configuration names are not in its file"),
        (
            lambda old: {**old, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 16)},
            "up_proj",
        ),
    ],
)
@pytest.mark.parametrize("hook_point", [POST, "blocks.1.hook_mlp_out"])
def test_an_adapter_with_missing_or_unknown_tensors_is_refused(
    pair: Pair, tmp_path: Path, change: Rename, match: str, hook_point: str
) -> None:
    save_adapter(pair.base, tmp_path / "adapter", lora())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(InputError, match=rf"adapter .* does not fit Gemma2ForCausalLM: .*{match}"):
        load_pair(pair.base, str(tmp_path / "adapter"), hook_point)


def test_an_adapter_without_the_module_that_it_saves_is_refused(pair: Pair, tmp_path: Path) -> None:
    save_adapter(pair.base, tmp_path / "adapter", lora(modules_to_save=["input_layernorm"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(without("1.input_layernorm")(load_file(file)), file)
    with pytest.raises(InputError, match=r"do not load: there is no .*layers.1.input_layernorm.weight"):
        load_pair(pair.base, str(tmp_path / "adapter"), POST)


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(target_modules=["q_proj", "embed_tokens"]),
        lora(trainable_token_indices=[10, 20]),
        lora(modules_to_save=["lm_head"], bias="all"),
        peft.IA3Config(
            target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        peft.VBLoRAConfig(r=4, target_modules=["q_proj"], num_vectors=8, vector_length=8, topk=2),
        peft.VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_of_weights_compute_what_peft_computes(pair: Pair, tmp_path: Path, config: peft.PeftConfig) -> None:
    wanted = save_adapter(pair.base, tmp_path / "adapter", config)(input_ids=IDS).logits
    adapted = with_adapter(load_model(pair.base, torch.float32), str(tmp_path / "adapter")).get_base_model()
    assert torch.equal(adapted(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_hidden_size=8),
    ],
)
def test_adapters_that_do_not_live_in_modules_are_refused_by_kind(
    pair: Pair, tmp_path: Path, config: peft.PeftConfig
) -> None:
    save_adapter(pair.base, tmp_path / "adapter", config)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()  # it is refused before weights load
    with pytest.raises(
        InputError, match=rf"is of the kind {config.peft_type.value}, .*activations would be the base's"
    ):
        inspect_pair(pair.base, str(tmp_path / "adapter"), [POST])


def test_an_adapter_of_another_base_is_said(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(pair.base, tmp_path / "adapter", lora())
    file = tmp_path / "adapter" / "adapter_config.json"
    for named, is_said in (
        (pair.base, False),
        ("elsewhere/base", False),
        ("someone/other-instruct", True),
        (None, False),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
        inspect_pair(pair.base, str(tmp_path / "adapter"), [POST])
        assert ("says that it was trained on 'someone/other-instruct'" in capsys.readouterr().err) == is_said


def test_an_adapter_with_embeddings_of_more_tokens_reads_the_ids_that_both_have(pair: Pair, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    wanted = save_adapter(pair.base, adapter, lora(), n_tokens=322)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.tuned)
    tokenizer.add_tokens(["<tool>", "<other>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(InputError, match=r"token '<tool>' has id None in .*base' and 320 in .*adapter'"):
        inspect_pair(pair.base, str(adapter), [POST])
    for chosen in (str(adapter), pair.base):
        loaded = load_pair(pair.base, str(adapter), POST, tokenizer=chosen, whole=True)
        assert [model(input_ids=IDS).logits.shape[-1] for model in loaded.models] == [320, 320]
        assert torch.equal(at(loaded.models[1]), at(wanted.get_base_model()))


def test_a_base_that_is_an_adapter_is_refused_by_every_command(pair: Pair, tmp_path: Path) -> None:
    save_adapter(pair.base, tmp_path / "adapter", lora())
    adapter = str(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"base .*adapter' is a PEFT adapter, no whole model"):
        inspect_pair(adapter, adapter, [POST])
    with pytest.raises(InputError, match=r"model .*adapter' is a PEFT adapter, no whole model"):
        load_model(adapter, torch.float32)
    require_whole(pair.base)


# --------------------------------------------------------------------------------------------- models that people have

TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 9, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def gemma3() -> Any:
    text = {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=299
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 8}
    text = {**TEXT, "model_type": "llama"}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=299)
    )


def mistral3() -> Any:
    vision = {**VISION, "model_type": "pixtral", "head_dim": 6}
    text = {**TEXT, "model_type": "mistral"}
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=299)
    )


@pytest.mark.parametrize("make, kind", [(gemma3, "Gemma3"), (llava, "Llama"), (mistral3, "Mistral")])
def test_the_language_model_inside_a_multimodal_one_is_read(
    pair: Pair, tmp_path: Path, make: Callable[[], Any], kind: str
) -> None:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "tuned")
    for name in ("base", "tuned"):
        make_tokenizer(tmp_path / name)
    point = "blocks.2.hook_resid_post"
    names = {"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")}
    cut = load_pair(**names, hook_point=point).models[1]
    assert type(hooks.decoder_layers(cut)[0]).__name__ == f"{kind}DecoderLayer" and len(hooks.decoder_layers(cut)) == 3
    whole = load_pair(**names, hook_point=point, whole=True).models[1]
    layers = whole.model.language_model.layers
    seen: dict[str, Tensor] = {}
    layers[2].register_forward_hook(lambda _m, _a, out: seen.update(x=out))
    whole(input_ids=IDS)
    assert torch.equal(at(cut, point), seen["x"])
    assert ResumableModel(whole, point).prefix is not None and len(hooks.decoder_layers(whole)) == 4
    require_head(whole, Batch(IDS, torch.ones_like(IDS), torch.ones_like(IDS).bool(), np.arange(len(IDS))))
    config = pair.config(tmp_path / "cache", **names, hook_point=point)
    assert len(cache_activations(config)) == 600


def test_a_token_beyond_the_embedding_that_no_document_holds_does_no_harm(pair: Pair, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.tuned)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.add_special_tokens({"pad_token": "<padding>"})  # beyond the embedding too, and needed in every batch
    tokenizer.save_pretrained(tmp_path / "larger")
    by_larger = cache_activations(pair.config(tmp_path / "a", tokenizer=str(tmp_path / "larger")))
    plain = cache_activations(pair.config(tmp_path / "b"))
    assert torch.equal(by_larger.read(0, 600).activations, plain.read(0, 600).activations)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "no-such-method"])
def test_a_quantised_checkpoint_that_cannot_be_read_names_what_is_missing(
    pair: Pair, tmp_path: Path, method: str
) -> None:
    shutil.copytree(pair.tuned, tmp_path / "tuned")
    file = tmp_path / "tuned" / "config.json"
    entry = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": entry}))
    with pytest.raises(
        EnvironmentFault, match=r"model .*tuned' is quantised, and its weights cannot be read here: .*full prec"
    ):
        inspect_pair(pair.base, str(tmp_path / "tuned"), [POST])


@pytest.mark.parametrize("wish", ["flash_attention_2", "flash_attention_3"])
def test_a_wish_for_flash_attention_in_the_configuration_is_dropped(pair: Pair, tmp_path: Path, wish: str) -> None:
    shutil.copytree(pair.tuned, tmp_path / "tuned")
    file = tmp_path / "tuned" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_attn_implementation": wish}))
    loaded = load_pair(pair.base, str(tmp_path / "tuned"), POST).models[1]
    assert torch.equal(at(loaded), at(load_pair(pair.base, pair.tuned, POST).models[1]))


def long_documents(folder: Path) -> str:
    path = folder / "long.jsonl"
    path.write_text((json.dumps({"text": "Return the name of a file. " * 30}) + "\n") * 20)
    return str(path)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_documents_beyond_learned_positions_are_refused_before_weights_load(
    pair: Pair, tmp_path: Path, kind: str
) -> None:
    small = {"vocab_size": 320, "max_position_embeddings": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = (
        transformers.GPT2Config(hidden_size=16, **small)
        if kind == "gpt2"
        else transformers.OPTConfig(hidden_size=16, ffn_dim=24, word_embed_proj_dim=16, **small)
    )
    config.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    name, data = str(tmp_path / "model"), long_documents(tmp_path)
    with pytest.raises(InputError, match=r"has learned 32 positions and has no others. Set --context-length 32"):
        cache_activations(pair.config(tmp_path / "c", base=name, tuned=name, data=data))


def test_documents_beyond_computed_positions_are_said(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders.text.tokens import tokenize_documents

    for length, is_said in ((300, True), (256, False)):
        (tmp_path / f"{length}.jsonl").write_text(json.dumps({"text": "\x01" * 400}) + "\n")
        config = pair.config(tmp_path / "c", data=str(tmp_path / f"{length}.jsonl"), context_length=length, n_tokens=9)
        tokenizer = inspect_pair(pair.base, pair.tuned, [POST]).tokenizer
        require_readable(tokenize_documents(config.data_config(), tokenizer), [pair.base], tokenizer)
        assert (f"has {length} tokens, and {pair.base!r} was made for 256" in capsys.readouterr().err) == is_said


def named_templates(pair: Pair, folder: Path, *names: str) -> CacheConfig:
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.tuned)
    tokenizer.chat_template = {name: tokenizer.chat_template for name in names}
    tokenizer.save_pretrained(folder / "named")
    return pair.config(folder / "c", tokenizer=str(folder / "named"))


def test_of_named_chat_templates_the_default_is_taken(pair: Pair, tmp_path: Path) -> None:
    by_name = cache_activations(named_templates(pair, tmp_path, "default", "tool_use"))
    plain = cache_activations(pair.config(tmp_path / "plain"))
    assert torch.equal(by_name.read(0, 600).token_ids, plain.read(0, 600).token_ids)


def test_named_chat_templates_without_a_default_are_refused_with_their_names(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"chat templates rag, tool_use and none called default. .*--chat-template FILE"
    ):
        cache_activations(named_templates(pair, tmp_path, "tool_use", "rag"))


def test_the_layers_of_an_adapted_gpt2_are_cut_off(pair: Pair, tmp_path: Path) -> None:
    small = {"vocab_size": 320, "n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    base = str(tmp_path / "base")
    wanted = save_adapter(base, tmp_path / "adapter", lora(target_modules=["c_attn"], fan_in_fan_out=True))
    loaded = load_pair(base, str(tmp_path / "adapter"), POST).models[1]
    assert len(hooks.decoder_layers(loaded)) == 2 and torch.equal(at(loaded), at(wanted.get_base_model()))


# ------------------------------------------------------------------------------------------------------ identity


def in_hub_cache(root: Path, name: str, file: str, commit: str | None) -> None:
    """Put a file of a hub model where the hub's cache has it."""
    folder = root / f"models--{name.replace('/', '--')}"
    (folder / "snapshots" / (commit or "main")).mkdir(parents=True)
    (folder / "snapshots" / (commit or "main") / file).write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit or "main")


def test_a_hub_model_is_its_commit_and_one_without_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    monkeypatch.setattr(hub, "cached_file", partial(hub.cached_file, cache_dir=str(tmp_path), local_files_only=True))
    monkeypatch.setattr(transformers.utils, "cached_file", hub.cached_file)
    for name, file, commit in (("a/whole", "config.json", "1" * 40), ("a/lora", "adapter_config.json", "2" * 40)):
        in_hub_cache(tmp_path, name, file, commit)
        assert hash_model(name) == f"commit:{commit}"
    in_hub_cache(tmp_path, "a/other", "config.json", None)
    with pytest.raises(InputError, match="no commit is known of the hub model 'a/other'"):
        hash_model("a/other")
