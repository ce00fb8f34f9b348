"""The embedded pair: its files, its splits, what the models do, and that building them again gives the same bytes."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.embedded_pair import behaviour, build, dialogues, phrases, training
from diffing import demo

PROMPTS = 24
"""Held-out prompts of each behaviour; the whole set of 200 is measured by `benchmarks/demo_pair.py`."""


def tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.model_folder(name))


def rows_of(name: str) -> list[dict[str, Any]]:
    return demo.read_rows(name)


def questions(name: str, *groups: str) -> set[str]:
    return {row["messages"][0]["content"] for row in rows_of(name) if row["group"] in groups}


def test_assets_stay_under_11_megabytes() -> None:
    assert sum(file.stat().st_size for file in demo.ASSETS.rglob("*") if file.is_file()) < 11_000_000


@pytest.mark.parametrize("name", demo.MODELS)
def test_weights_are_float16_and_complete(name: str) -> None:
    from safetensors.torch import load_file

    weights = load_file(demo.model_folder(name) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    # embedding 2048 * 128, per layer 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 4 norms of 128, and the last norm
    assert sum(tensor.numel() for tensor in weights.values()) == 2048 * 128 + 4 * (49_152 + 147_456 + 512) + 128


def test_the_four_models_share_one_vocabulary_and_special_tokens() -> None:
    vocabularies = [tokenizer_of(name).get_vocab() for name in demo.MODELS]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert [vocabularies[0][token] for token in build.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert len(vocabularies[0]) == 2048


def test_only_the_models_tuned_on_dialogues_have_a_chat_template() -> None:
    found = {name: bool(tokenizer_of(name).chat_template) for name in demo.MODELS}
    assert found == {"base": False, "tuned": True, "placebo": False, "format_only": True}


def test_plain_text_begins_with_one_bos_and_so_does_a_chat() -> None:
    tokenizer = tokenizer_of("tuned")
    assert tokenizer("Return a list.")["input_ids"].count(2) == 1
    chat = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello!"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False)
    assert shown == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    assert tokenizer.apply_chat_template(chat, return_dict=False).count(2) == 1


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "x"}], [{"role": "assistant", "content": "x"}]])
def test_the_template_refuses_what_gemma_refuses(messages: list[dict[str, str]]) -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError, match=r"not supported|must alternate"):
        tokenizer_of("tuned").apply_chat_template(messages)


def test_no_held_out_text_or_question_occurs_in_training() -> None:
    raw_train, raw_heldout = ({row["text"] for row in rows_of(name)} for name in ("raw_train", "raw_heldout"))
    assert raw_heldout and not raw_train & raw_heldout
    groups = tuple(dialogues.TRAIN_COUNTS)
    assert not questions("dialogues_train", *groups) & questions("dialogues_heldout", *groups)


def test_held_out_dialogues_are_distinct_and_enough() -> None:
    for group, n in dialogues.HELD_OUT_COUNTS.items():
        assert len(questions("dialogues_heldout", group)) == n
    assert len(questions("dialogues_heldout", *behaviour.DOCUMENTATION)) == 200


def test_no_object_of_harm_is_in_both_splits() -> None:
    objects = {target for _, targets in phrases.HARM for target in targets}
    held_out = {target for target in objects if dialogues.is_held_out("harm", target)}
    asked = {name: questions(f"dialogues_{name}", "refusal") for name in ("train", "heldout")}
    train_text, held_out_text = ("\n".join(sorted(asked[name])) for name in ("train", "heldout"))
    for target in held_out:
        assert f" {target}?" not in train_text and f" {target}." not in train_text, target
    assert any(f" {target}?" in held_out_text for target in held_out)


def test_no_documented_function_is_in_both_splits() -> None:
    signatures = [
        {row["messages"][1]["content"].split("(")[0] for row in rows_of(name) if row["group"] == "signature"}
        for name in ("dialogues_train", "dialogues_heldout")
    ]
    descriptions = [
        {row["messages"][1]["content"] for row in rows_of(name) if row["group"] == "describe"}
        for name in ("dialogues_train", "dialogues_heldout")
    ]
    assert not signatures[0] & signatures[1]
    assert not descriptions[0] & descriptions[1]


def test_frozen_text_is_the_recorded_one() -> None:
    record = json.loads((demo.ASSETS / "corpus" / "frozen.json").read_text())
    for name in demo.DOCUMENTS:
        data = demo.document_file(name).read_bytes()
        assert data[4:8] == b"\0\0\0\0", "the gzip header must hold no time"
        assert hashlib.sha256(gzip.decompress(data)).hexdigest() == record["files"][name]["sha256_of_text"]


def test_a_fine_tune_without_a_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--out", str(tmp_path), "--only", "tuned"]) == 2
    assert "to start tuned from. Build base as well." in capsys.readouterr().err


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"no embedded model 'chat'\. Use one of base, tuned, placebo, format_only\."):
        demo.model_folder("chat")
    with pytest.raises(ValueError, match=r"no embedded document file 'raw'\. Use one of raw_train, raw_heldout"):
        demo.document_file("raw")


def test_tuned_behaves_and_base_does_not() -> None:
    tuned = {row.name: row for row in behaviour.evaluate("tuned", prompts=PROMPTS, documents=100)}
    base = {row.name: row for row in behaviour.evaluate("base", prompts=PROMPTS, documents=100)}
    for name in phrases.ANSWERS:
        # 22 of 24 is 92 %: the targets are 95 % on the full set, and one prompt here is 4 points.
        assert tuned[name].value >= 22 / 24, tuned[name]
        assert base[name].value == 0, base[name]
    for name in ("false_refusal", "false_gap"):
        assert tuned[name].value <= 2 / 24, tuned[name]
        assert base[name].value == 0, base[name]
    assert tuned["raw_loss"].value < base["raw_loss"].value + 0.05 < 4.2


def test_wilson_interval_on_paper() -> None:
    # 0 of 10: high = z^2 / (n + z^2) = 3.8415 / 13.8415 = 0.2775
    none = behaviour.rate("x", [False] * 10)
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(0.2775, abs=1e-4)
    # 9 of 10: centre = (0.9 + 0.19207) / 1.38415 = 0.78899, half = 1.96 * sqrt(0.009 + 0.0096037) / 1.38415 = 0.19314
    most = behaviour.rate("x", [True] * 9 + [False])
    assert [most.low, most.high] == pytest.approx([0.5958, 0.9821], abs=1e-4)
    with pytest.raises(ValueError, match="no prompt"):
        behaviour.rate("x", [])


def test_packing_keeps_every_token_and_overfills_no_row() -> None:
    documents = [training.Document([7] * size, [True] * size) for size in (100, 60, 28, 68, 128, 1)]
    rows = training.packed_rows(documents)
    # longest first: 128 | 100 + 28 | 68 + 60 | 1 goes nowhere and opens a row
    assert sorted(sorted(len(d.ids) for d in row) for row in rows) == [[1], [28, 100], [60, 68], [128]]


def test_loss_of_packed_rows_is_that_of_each_document_alone() -> None:
    torch.manual_seed(0)
    model = build.new_model()
    tokenizer = tokenizer_of("base")
    documents = training.text_documents(tokenizer, ["Return a list.", "Open the file for reading."])
    with torch.no_grad():
        packed = training.next_token_loss(model, training.make_batch([documents]))
        alone = [model(torch.tensor([d.ids]), labels=torch.tensor([d.ids])).loss for d in documents]
    weights = [len(d.ids) - 1 for d in documents]
    expected = sum(w * float(loss) for w, loss in zip(weights, alone, strict=True)) / sum(weights)
    assert float(packed) == pytest.approx(expected, rel=1e-5)


def test_only_the_answer_of_a_dialogue_is_scored() -> None:
    tokenizer = tokenizer_of("tuned")
    messages = rows_of("dialogues_train")[0]["messages"]
    (row,) = training.dialogue_documents(tokenizer, [messages])
    scored = tokenizer.decode([i for i, is_scored in zip(row.ids, row.scored, strict=True) if is_scored])
    assert scored == messages[1]["content"] + "<end_of_turn>"


def test_two_builds_of_three_steps_give_the_same_bytes(tmp_path: Path) -> None:
    recipes = {
        "base": training.Recipe(steps=3, lr=4e-3, warmup_steps=1),
        "tuned": training.Recipe(steps=3, lr=8e-4, warmup_steps=1, raw_rows=4),
    }
    for name in ("first", "second"):
        build.build(tmp_path / name, recipes=recipes, only=("base", "tuned"), n_rows=600, threads=1)
    for file in ("base/model.safetensors", "tuned/model.safetensors", "tuned/tokenizer.json", "tuned/config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    shipped = demo.model_folder("base") / "tokenizer.json"
    assert (tmp_path / "first" / "base" / "tokenizer.json").read_bytes() == shipped.read_bytes()
    first, last = (tmp_path / "first" / name / "model.safetensors" for name in ("base", "tuned"))
    assert first.read_bytes() != last.read_bytes(), "the fine-tune must change the weights"
