"""Tokens: one BOS, roles by character, masks by id, every row in one batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pair, make_tokenizer

from crosscoders import CacheConfig, InputError
from crosscoders.models.pair import inspect_pair
from crosscoders.text.padding import make_batch, pad
from crosscoders.text.tokens import (
    ROLES,
    pad_rows,
    tokenize_chat,
    tokenize_documents,
    tokenize_prompt,
    tokenize_text,
)

POST = "blocks.1.hook_resid_post"


def tokenizer_of(pair: Pair) -> object:
    return inspect_pair(pair.base, pair.tuned, [POST]).tokenizer


def refuse(config: CacheConfig, match: str) -> None:
    from crosscoders import cache_activations

    with pytest.raises(InputError, match=match):
        cache_activations(config)


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
    rows = tokenize_documents(pair.config(tmp_path).data_config(), tokenizer_of(pair))
    batch = pad_rows(rows, np.array([0, 1, 2]), pad_id=5)
    lengths = np.diff(rows.offsets)[:3]
    assert (batch.attention_mask.sum(axis=1) == lengths).all()
    assert (batch.scored.sum(axis=1) == lengths - 1).all()
    assert not batch.scored[batch.ids == 2].any()
    kept = tokenize_documents(pair.config(tmp_path, drop_bos=False).data_config(), tokenizer_of(pair))
    assert kept.scored.all()


def test_every_row_is_in_exactly_one_batch(pair: Pair, tmp_path: Path) -> None:
    rows = tokenize_documents(pair.config(tmp_path, n_tokens=900).data_config(), tokenizer_of(pair))
    for size in (1, 3, 100):
        assert sorted(np.concatenate(rows.batches(size)).tolist()) == list(range(len(rows.groups)))


def test_long_documents_are_cut_and_counted(pair: Pair, tmp_path: Path) -> None:
    rows = tokenize_documents(pair.config(tmp_path, context_length=8, n_tokens=300).data_config(), tokenizer_of(pair))
    assert np.diff(rows.offsets).max() == 8
    assert rows.counts["cut_tokens"] > 0


def test_chats_without_a_template_anywhere_are_refused_and_a_file_helps(pair: Pair, tmp_path: Path) -> None:
    config = pair.config(tmp_path / "c", tuned=pair.base)
    refuse(config, "neither model's tokenizer has a chat template. Give one: --chat-template FILE")
    refuse(pair.config(tmp_path / "c", chat_template=str(tmp_path / "no.jinja")), "no.jinja' does not exist")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    config = pair.config(tmp_path / "c", tuned=pair.base, chat_template=str(tmp_path / "t.jinja"))
    rows = tokenize_documents(config.data_config(), tokenizer_of(pair))
    assert rows.n_scored >= 600


def test_a_prompt_ends_where_the_answer_begins_as_in_the_library_call(pair: Pair) -> None:
    tokenizer, chat = tokenizer_of(pair), [{"role": "user", "content": "Return the sum?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]  # type: ignore[attr-defined]
    assert tokenize_prompt(tokenizer, "Return the sum?") == asked


def test_a_prompt_without_a_template_is_plain_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path, template=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenize_prompt(tokenizer, "Return the sum?") == tokenizer("Return the sum?")["input_ids"]


def test_rows_are_padded_on_the_right_and_padding_is_neither_seen_nor_scored() -> None:
    ids = [np.array([5, 6, 7]), np.array([8])]
    assert pad(ids, -1, torch.int64).tolist() == [[5, 6, 7], [8, -1, -1]]
    scored = [np.array([False, True, True]), np.array([True])]
    batch = make_batch(ids, scored, np.array([4, 9]), pad_id=3)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.scored.tolist() == [[False, True, True], [True, False, False]]


def test_rows_that_are_taken_keep_their_numbers_and_their_width() -> None:
    ids = [np.array([5, 6, 7]), np.array([8])]
    batch = make_batch(ids, [row > 5 for row in ids], np.array([4, 9]), pad_id=3).take(torch.tensor([1, 1]))
    assert batch.numbers.tolist() == [9, 9] and batch.ids.tolist() == [[8, 3, 3]] * 2
    assert batch.scored.tolist() == [[True, False, False]] * 2
