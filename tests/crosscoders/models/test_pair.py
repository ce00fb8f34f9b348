"""Documents, tokens, pair and hooks: the same ids for both models, masks by id, the same numbers by every route."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, Pair, make_model, make_tokenizer

from crosscoders import CacheConfig, DataSource, EnvironmentFault, InputError, load_pair
from crosscoders.models.hooks import capture, replace, run_to
from crosscoders.models.pair import inspect_pair
from crosscoders.text.documents import Document, read_documents, read_source, shuffled
from crosscoders.text.tokens import ROLES, pad_rows, tokenize_chat, tokenize_documents, tokenize_text

POST = "blocks.1.hook_resid_post"


def tokenizer_of(pair: Pair) -> object:
    return inspect_pair(pair.base, pair.tuned, [POST]).tokenizer


# ------------------------------------------------------------------------------------------------------------ tokens


def test_text_has_exactly_one_bos(pair: Pair) -> None:
    ids, roles = tokenize_text(tokenizer_of(pair), "Return the name.")
    assert ids[0] == 2 and ids.count(2) == 1 and set(roles) == {ROLES.index("text")}


def test_a_chat_has_one_bos_and_the_ids_of_the_library_call(pair: Pair) -> None:
    tokenizer = tokenizer_of(pair)
    messages = [{"role": "user", "content": " Return the sum? "}, {"role": "assistant", "content": "The sum."}]
    ids, roles = tokenize_chat(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]  # type: ignore[attr-defined]
    assert ids.count(2) == 1
    said = {name: tokenizer.decode([i for i, r in zip(ids, roles, strict=True) if r == ROLES.index(name)])  # type: ignore[attr-defined]
            for name in ("user", "assistant")}  # fmt: skip
    assert said == {"user": "Return the sum?", "assistant": "The sum."}


def test_contents_that_look_like_the_template_are_told_apart_from_it(pair: Pair) -> None:
    tokenizer = tokenizer_of(pair)
    said = ["user", "model", "turn", "<bos>", "", " user user "]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
    ids, roles = tokenize_chat(tokenizer, messages)
    shown = [tokenizer.decode([i]) if r != ROLES.index("template") else "|" for i, r in zip(ids, roles, strict=True)]  # type: ignore[attr-defined]
    assert [part for part in "".join(shown).split("|") if part] == ["user", "model", "turn", "<bos>", "user user"]


def test_a_template_that_drops_contents_is_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="the chat template drops or changes the content of a message"):
        tokenize_chat(tokenizer_of(pair), [{"role": "user", "content": "x"}], "{{ bos_token }}nothing")


def test_a_template_that_repeats_the_bos_does_not_double_it(pair: Pair) -> None:
    template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids, roles = tokenize_chat(tokenizer_of(pair), [{"role": "user", "content": "x"}], template)
    assert ids.count(2) == 1 and len(ids) == len(roles)


def test_padding_is_masked_by_the_attention_mask_and_bos_by_id(pair: Pair, tmp_path: Path) -> None:
    rows = tokenize_documents(pair.config(tmp_path), tokenizer_of(pair), None)
    batch = pad_rows(rows, np.array([0, 1, 2]), pad_id=5)
    lengths = np.diff(rows.offsets)[:3]
    assert (batch.attention_mask.sum(axis=1) == lengths).all()
    assert (batch.scored.sum(axis=1) == lengths - 1).all()
    assert not batch.scored[batch.ids == 2].any()
    kept = tokenize_documents(pair.config(tmp_path, drop_bos=False), tokenizer_of(pair), None)
    assert kept.scored.all()


def test_every_row_is_in_exactly_one_batch(pair: Pair, tmp_path: Path) -> None:
    rows = tokenize_documents(pair.config(tmp_path, n_tokens=900), tokenizer_of(pair), None)
    for size in (1, 3, 100):
        assert sorted(np.concatenate(rows.batches(size)).tolist()) == list(range(len(rows.groups)))


def test_long_documents_are_cut_and_counted(pair: Pair, tmp_path: Path) -> None:
    rows = tokenize_documents(pair.config(tmp_path, context_length=8, n_tokens=300), tokenizer_of(pair), None)
    assert np.diff(rows.offsets).max() == 8
    assert rows.counts["cut_tokens"] > 0


# --------------------------------------------------------------------------------------------------------- documents


def contents(path: Path, **settings: str) -> list[object]:
    return [document.content for document in read_source(DataSource(path=str(path), **settings))]


def test_text_jsonl_gzip_parquet_and_folders_give_the_same_documents(tmp_path: Path) -> None:
    import pandas

    texts = ["One document.", "Another\none.", "Third."]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n\n \n")
    (tmp_path / "b.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "d.parquet")
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"):
        assert [str(c).strip() for c in contents(tmp_path / name)] == texts, name
    assert len(contents(tmp_path)) == 12


def test_a_datasets_id_is_read_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None, **settings: object) -> list[dict[str, str]]:
        asked.append((path, name, settings))
        return [{"text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [d for d in read_source(DataSource(path="owner/set", name="en", split="test"))] == [
        Document("from the hub", "owner/set", "row 1 of 'owner/set'")
    ]
    assert asked == [("owner/set", "en", {"split": "test", "streaming": True})]


def test_sources_are_mixed_by_tokens_in_proportion_to_their_weights(tmp_path: Path) -> None:
    for name, n in (("a", 400), ("b", 400)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(n)))
    sources = [DataSource(path=str(tmp_path / "a.jsonl")), DataSource(path=str(tmp_path / "b.jsonl"), weight=3.0)]
    cost = random.Random(0)
    costs = {f"{name}{i}": cost.randint(1, 9) for name in "ab" for i in range(400)}
    mixed = read_documents(sources, shuffle_window=0, seed=0, count_tokens=lambda d: costs[str(d.content)])
    spent = {"a": 0, "b": 0}
    for _, document in zip(range(300), mixed, strict=False):
        spent[document.group] += costs[str(document.content)]
    assert 2.9 < spent["b"] / spent["a"] < 3.1


def test_shuffling_is_a_function_of_the_seed_and_loses_nothing() -> None:
    documents = [Document(str(i), "g") for i in range(10)]
    once, again = (list(shuffled(documents, 4, "0")) for _ in range(2))
    assert once == again != documents and sorted(once) == documents
    assert list(shuffled(documents, 0, "0")) == documents


# ------------------------------------------------------------------------------------------------- pair and hooks


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


# --------------------------------------------------------------------------------------------------------- bad input


def refuse(config: CacheConfig, match: str) -> None:
    from crosscoders import cache_activations

    with pytest.raises(InputError, match=match):
        cache_activations(config)


def test_unequal_widths_are_refused_before_weights_load(pair: Pair, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "wide")
    make_model(tmp_path / "wide", seed=0, d_model=32)
    (tmp_path / "wide" / "model.safetensors").unlink()
    refuse(pair.config(tmp_path / "c", tuned=str(tmp_path / "wide")), r"has d_model 16 but tuned .* has 32. Choose two")


def test_a_layer_out_of_range_is_refused(pair: Pair, tmp_path: Path) -> None:
    refuse(pair.config(tmp_path / "c", hook_point="blocks.3.hook_resid_post"), "has layers 0 to 2. Use 'blocks.1.hook")
    refuse(pair.config(tmp_path / "c", hook_point="resid_post"), "has no layer. Use a name such as 'blocks.13")
    refuse(pair.config(tmp_path / "c", hook_point="blocks.1.hook_nothing"), "is not in this model. It has, for example")


def test_tokenizers_that_differ_are_refused(pair: Pair, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other", words=["entirely different words here"] * 3)
    make_model(tmp_path / "other", seed=1)
    refuse(pair.config(tmp_path / "c", tuned=str(tmp_path / "other")), "the tokenizers differ: token .* has id")


def test_chats_without_a_template_anywhere_are_refused_and_a_file_helps(pair: Pair, tmp_path: Path) -> None:
    config = pair.config(tmp_path / "c", tuned=pair.base)
    refuse(config, "neither model's tokenizer has a chat template. Give one: --chat-template FILE")
    refuse(pair.config(tmp_path / "c", chat_template=str(tmp_path / "no.jinja")), "no.jinja' does not exist")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    rows = tokenize_documents(config, tokenizer_of(pair), (tmp_path / "t.jinja").read_text())
    assert rows.n_scored >= 600


def test_a_missing_column_is_named_with_those_that_are_there(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"txt": "a", "id": 1}\n')
    refuse(
        pair.config(tmp_path / "c", data=str(tmp_path / "d.jsonl")),
        r"row 1 of .* has no column 'text' and no 'messages'; its columns are id, txt; did you mean 'txt'\? Set text",
    )


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("e.jsonl", "", "the data holds no text"),
        ("e.jsonl", '{"text": "  "}\n', "the data holds no text"),
        ("e.jsonl", '{"text": "a"\n', "line 1 of .* is not JSON"),
        ("e.jsonl", "[1]\n", "line 1 of .* is not a JSON object"),
        ("e.jsonl", '{"messages": [{"role": "user"}]}\n', "column 'messages' in row 1 of .* is not a list of"),
        ("e.csv", "a,b\n", "is of no known kind; use one of .txt"),
    ],
)
def test_empty_or_broken_data_is_refused(pair: Pair, tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    refuse(pair.config(tmp_path / "c", data=str(tmp_path / name)), match)


def test_data_that_is_not_there_or_too_short_is_refused(pair: Pair, tmp_path: Path) -> None:
    refuse(pair.config(tmp_path / "c", data=str(tmp_path / "no.jsonl")), "no.jsonl' does not exist. Check the path")
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    refuse(
        pair.config(tmp_path / "c", data=str(tmp_path / "s.jsonl")),
        r"has only \d+ scored tokens in 1 documents but n_tokens is 600. Set --n-tokens \d+, or add data",
    )


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


def test_files_that_are_not_what_they_claim_name_file_and_row(pair: Pair, tmp_path: Path) -> None:
    for name, data, match in [
        ("l.txt", "café".encode("latin-1"), "l.txt' cannot be read as its name says"),
        ("b.jsonl.gz", b"not gzip", "b.jsonl.gz' cannot be read as its name says"),
        ("p.parquet", b"not parquet", "p.parquet' cannot be read as its name says"),
        ("n.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 2 of .*n.jsonl' holds 5, not text"),
        ("s.jsonl", b'{"text": "\\ud800"}\n', "row 1 of .*s.jsonl'.* half a character"),
        ("m.jsonl", b'{"messages": []}\n', "row 1 of .*m.jsonl' is not a list of"),
        ("t.jsonl", b'{"text": "a", "group": "template"}\n', "is the name of chat-template tokens"),
    ]:
        (tmp_path / name).write_bytes(data)
        refuse(pair.config(tmp_path / "c", data=str(tmp_path / name)), match)


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
