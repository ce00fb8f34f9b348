"""Rows that cannot be read are left out and counted; too many of them end the run."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS, Pair
from transformers import AutoTokenizer

from crosscoders import ActivationCache, DataSource, InputError, cache_activations, run_cache
from crosscoders.activations.merge import merge_parts
from crosscoders.activations.plan import make_plan
from crosscoders.activations.settings import Part
from crosscoders.text.chats import read_chats
from crosscoders.text.documents import read_source
from crosscoders.text.refusals import REASONS, Refusals, Refused
from crosscoders.text.settings import DataConfig
from crosscoders.text.tokens import tokenize_documents

STRICT = (  # as Gemma's: turns alternate; a system message is taken, reasoning of an answer left out
    "{{ bos_token }}{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% for m in turns %}{% if (m.role == 'assistant') != (loop.index0 % 2 == 1) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content.split('</think>')[-1].strip() }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }}{% endfor %}<end_of_turn>\n{% endfor %}"
)


def talk(*contents: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    """A row of the shape of LMSYS-Chat-1M."""
    roles = [role] + ["assistant" if i % 2 else "user" for i in range(1, len(contents))]
    conversation = [{"role": r, "content": content} for r, content in zip(roles, contents, strict=True)]
    moderation = [{"flagged": False, "category_scores": {"violence": 1e-5}} for _ in contents]
    return {"conversation_id": "a1", "conversation": conversation, "openai_moderation": moderation, "redacted": False,
            "language": "English", "turn": len(contents) // 2, **more}  # fmt: skip


GOOD = [
    talk("Return the NAME_1 of a file", "The name.", redacted=True),
    talk("", ""),
    talk("What is it?", "<think>A node.</think>\n\nThe size of a node."),
    {"conversation": [{"role": "system", "content": "Be kind."}, *talk("Hi", "Hello")["conversation"]]},
    {"conversation": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
    ]},
]  # fmt: skip
BAD: dict[str, list[Any]] = {
    "broken_json": ['{"conversation": [', "[1]", b'{"conversation": "\xe9"}'],
    "no_column": [{"prompt": "x"}, {"conversation": None}],
    "no_messages": [talk(None, "x"), talk(["parts"], "x"), {"conversation": []}, {"conversation": "Hi"}],
    "template_error": [talk("a", "b", role="assistant"), talk("a") | {"conversation": talk("a")["conversation"] * 2}],
    "content_changed": [talk("Hi", "before <think>hm</think> after")],
    "no_unicode": [talk("\ud800", "x")],
    "no_text": [{"text": 5}],
    "reserved_group": [talk("Hi", "Hello", group="template")],
}


def write(path: Path, rows: list[Any]) -> str:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def lmsys(folder: Path, n_good: int = 200) -> list[DataSource]:
    bad = [row for rows in BAD.values() for row in rows]
    good = [GOOD[i % len(GOOD)] for i in range(n_good)]
    mixed = [
        row
        for i, row in enumerate(good)
        for row in ([row, bad[i // 10]] if i % 10 == 0 and i // 10 < len(bad) else [row])
    ]
    return [DataSource(path=write(folder / "lmsys.jsonl", mixed), messages_column="conversation")]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "strict.jinja").write_text(STRICT)
    return {"chat_template": str(tmp_path / "strict.jinja"), "data": lmsys(tmp_path), "shuffle_documents": 16}


EXPECTED = {reason: len(rows) for reason, rows in BAD.items()}


def test_a_file_with_every_kind_of_wrong_row_is_cached_and_the_manifest_counts_them(
    pair: Pair, tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig(n_tokens=10**9, **settings)
    with pytest.raises(InputError, match=r"only [\d,]+ scored tokens in 200 documents"):  # all good rows, no other
        tokenize_documents(data, AutoTokenizer.from_pretrained(pair.tuned))
    capsys.readouterr()
    cache = cache_activations(pair.config(tmp_path / "c", n_tokens=6900, **settings))
    told = capsys.readouterr().err.splitlines()
    assert cache.manifest["refused"] == EXPECTED and next(iter(cache.manifest["refused"])) == "no_messages"
    assert sum("left out (" in line for line in told) == len(EXPECTED) == len(REASONS)
    assert any(line.startswith("left out 15 of 2") and "4 no_messages" in line for line in told)
    assert any("left out (broken_json): line" in line and "lmsys.jsonl' is not" in line for line in told)


def test_parts_and_a_live_plan_count_the_same_rows_as_one_cache(
    pair: Pair, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for number in (1, 2):
        run_cache(pair.config(tmp_path / str(number), n_tokens=2000, **settings), part=Part(number, 2))
    merge_parts([str(tmp_path / "1"), str(tmp_path / "2")], str(tmp_path / "merged"))
    whole = pair.config(tmp_path / "whole", n_tokens=2000, **settings)
    refused = cache_activations(whole).manifest["refused"]
    assert refused and sum(refused.values()) < sum(EXPECTED.values())  # of the rows that were read, not of the file
    assert ActivationCache(tmp_path / "merged").manifest["refused"] == refused == make_plan(whole).rows.refused


def test_causal_chats_pass_over_the_rows_that_the_cache_leaves_out(pair: Pair, settings: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.tuned)
    found = read_chats(DataConfig(n_tokens=1, **settings), tokenizer, 1000)
    assert len(found) == 4 * 200 // 5 - 40  # an empty answer and a tool call alone are no response


def test_zero_ends_the_run_at_the_first_row_that_cannot_be_read(
    pair: Pair, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"1 of \d+ rows cannot be read, more than max_refused = 0 admits"):
        cache_activations(pair.config(tmp_path / "c", max_refused=0, **settings))
    clean = {
        **settings,
        "data": [DataSource(path=write(tmp_path / "g.jsonl", GOOD * 40), messages_column="conversation")],
    }
    assert cache_activations(pair.config(tmp_path / "c", max_refused=0, **clean)).manifest["refused"] == {}


@pytest.mark.parametrize("wrong", ["{", '{"txt": "a"}', '{"text": 5}'])
def test_a_file_that_is_wrong_throughout_ends_with_its_first_row(pair: Pair, tmp_path: Path, wrong: str) -> None:
    data = write(tmp_path / "w.jsonl", [wrong] * 5000)
    with pytest.raises(InputError, match=r"(row|line) 1 of .* 11 of 11 rows cannot be read"):
        tokenize_documents(
            DataConfig(data=data, n_tokens=100, shuffle_documents=0), AutoTokenizer.from_pretrained(pair.tuned)
        )


def test_a_share_decides_only_after_a_hundred_rows_or_at_the_end() -> None:
    refusals = Refusals(0.1)
    for _ in range(10):
        refusals.n_rows += 1
        refusals.add(Refused("no_text", "first."))
    with pytest.raises(InputError, match=r"first\. 10 of 10 rows cannot be read, more than max_refused = 0.1 admits"):
        refusals.finish()
    refusals.n_rows = 100
    assert refusals.finish() == {"no_text": 10}
    with pytest.raises(InputError, match="11 of 101 rows"):
        refusals.n_rows += 1
        refusals.add(Refused("no_text", "later."))


def test_a_refused_row_keeps_its_place_so_that_the_others_keep_theirs(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": text} for text in TEXTS[:6]]
    path = write(tmp_path / "a.jsonl", [*rows[:3], "{", *rows[3:]])
    found = list(read_source(DataSource(path=path)))
    assert [document.refused is None for document in found] == [True, True, True, False, True, True, True]
    assert [document.content for document in found if document.refused is None] == TEXTS[:6]


def test_tools_may_be_json_and_nonsense_there_is_refused(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "x", "name": None}]}
    tools: list[Any] = [[{"name": "f"}], '[{"name": "f"}]', None, "", [], "{}", "no", 5]
    path = write(tmp_path / "t.jsonl", [chat | {"tools": value} for value in tools])
    found = list(read_source(DataSource(path=path)))
    assert [document.tools for document in found[:5]] == [[{"name": "f"}]] * 2 + [None] * 3
    assert [document.refused.reason for document in found if document.refused] == ["no_messages"] * 3
    assert found[0].content == [{"role": "user", "content": "x"}]  # a null is no name
