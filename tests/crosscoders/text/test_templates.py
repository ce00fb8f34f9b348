"""Chats and texts become what was asked: one BOS, a fixed date, tool calls, reasoning and white space located."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, Pair
from transformers import AutoTokenizer

from crosscoders import ActivationCache, InputError, cache_activations, run_cache
from crosscoders.activations.merge import merge_parts
from crosscoders.activations.settings import Part
from crosscoders.text import templates
from crosscoders.text.chats import read_chats
from crosscoders.text.refusals import Refused
from crosscoders.text.settings import DataConfig
from crosscoders.text.templates import dated
from crosscoders.text.tokens import ROLES, tokenize_chat, tokenize_prompt, tokenize_text
from diffing.null.runs import null_cache

TODAY = "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
TURNS = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\nBODY<end_of_turn>\n{% endfor %}"
TOOLS = (
    "{{ bos_token }}{% for tool in tools or [] %}TOOL {{ tool.name }}\n{% endfor %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}"
    "{% if m.tool_call_id %} #{{ m.tool_call_id }}{% endif %}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
)
R1 = TURNS.replace("BODY", "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}")
QWEN = TURNS.replace(
    "BODY",
    "{% set parts = m.content.split('</think>') %}"
    "{% if m.role != 'assistant' %}{{ m.content }}"
    "{% elif loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}"
    "\n</think>\n\n{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ parts[-1].lstrip('\n') }}{% endif %}",
)
SYSTEM = (
    "{{ bos_token }}{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if s else messages) %}<start_of_turn>{{ m.role }}\n"
    "{{ s if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture(scope="module")
def tokenizer(pair: Pair) -> Any:
    return AutoTokenizer.from_pretrained(pair.tuned)


def words_by_role(tokenizer: Any, ids: list[int], roles: list[int], *names: str) -> list[str]:
    return [tokenizer.decode([i for i, r in zip(ids, roles, strict=True) if ROLES[r] == name]) for name in names]


# ------------------------------------------------------------------------------------------------------------ raw text


@pytest.mark.parametrize(
    "text",
    ["<bos>Return the name.", "<bos><bos>Return the name.", "<bos><start_of_turn>user\nHi<end_of_turn>", "Return."],
)
def test_text_that_brings_its_bos_has_one_at_its_start(tokenizer: Any, text: str) -> None:
    ids, roles = tokenize_text(tokenizer, text)
    assert ids[0] == 2 and ids.count(2) == 1 and len(ids) == len(roles)
    assert tokenizer.decode(ids[1:]) == text.replace("<bos>", "")


def test_other_control_tokens_in_text_are_read_as_the_tokenizer_reads_them(tokenizer: Any) -> None:
    ids, roles = tokenize_text(tokenizer, "one<eos>two<end_of_turn>three<bos>four")
    assert [ids.count(token) for token in (1, 4, 2)] == [1, 1, 2]
    assert set(roles) == {ROLES.index("text")}


# -------------------------------------------------------------------------------------------------------- tools, roles


def test_tool_calls_tools_names_and_ids_reach_the_template(tokenizer: Any) -> None:
    call = {"type": "function", "id": "7", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chat = [
        said("user", "Weather?", name="ann"),
        said("assistant", "", tool_calls=[call]),
        said("tool", '{"degrees": "12"}', tool_call_id="7"),
        said("assistant", "It is 12."),
    ]
    tools = [{"name": "weather"}]
    ids, roles = tokenize_chat(tokenizer, chat, TOOLS, tools=tools)
    assert ids == tokenizer.apply_chat_template(chat, chat_template=TOOLS, tools=tools, return_dict=True)["input_ids"]
    shown = tokenizer.decode(ids)
    assert "TOOL weather" in shown and 'CALL weather {"city": "Oslo"}' in shown and "user ann" in shown
    assert words_by_role(tokenizer, ids, roles, "user", "assistant", "tool") == [
        "Weather?", "It is 12.", '{"degrees": "12"}',
    ]  # fmt: skip


def test_a_tool_answer_that_a_template_writes_as_json_is_located(tokenizer: Any) -> None:
    template = TURNS.replace("BODY", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    ids, roles = tokenize_chat(tokenizer, [said("user", "x"), said("tool", 'a "b"\nc')], template)
    assert words_by_role(tokenizer, ids, roles, "tool") == ['a \\"b\\"\\nc']


@pytest.mark.parametrize(
    "role, counted",
    [("model", "assistant"), ("developer", "system"), ("ipython", "tool"), ("function", "tool"), ("critic", "user")],
)
def test_other_names_of_roles_count_as_what_they_are(tokenizer: Any, role: str, counted: str) -> None:
    ids, roles = tokenize_chat(tokenizer, [said(role, "words")], TURNS.replace("BODY", "{{ m.content }}"))
    assert words_by_role(tokenizer, ids, roles, counted) == ["words"]


def test_the_indices_of_the_roles_of_older_caches_stay() -> None:
    assert ROLES[:5] == ("text", "template", "user", "assistant", "system")


# --------------------------------------------------------------------------------------------- reasoning, white space


@pytest.mark.parametrize(
    "template, chat, answers",
    [
        (R1, [said("user", "hi"), said("assistant", "<think>hm</think>\n\nyes")], "yes"),
        (R1, [said("user", "hi"), said("assistant", "\nyes ")], "yes "),
        (QWEN, [said("user", "hi"), said("assistant", "<think>hm</think>yes")], "hmyes"),
        (QWEN, [said("assistant", "<think>\nhm\n</think>\nyes"), said("user", "hi"), said("assistant", "no")], "yesno"),
        (SYSTEM, [said("system", "Be kind.\n"), said("user", "hi "), said("assistant", "yes")], "yes"),
        (CHAT_TEMPLATE, [said("user", "\n hi"), said("assistant", "<think>hm</think> yes ")], "<think>hm</think> yes"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_of_an_answer_is_the_answer(
    tokenizer: Any, template: str, chat: list[dict[str, Any]], answers: str
) -> None:
    ids, roles = tokenize_chat(tokenizer, chat, template)
    assert ids == tokenizer.apply_chat_template(chat, chat_template=template, return_dict=True)["input_ids"]
    assert words_by_role(tokenizer, ids, roles, "assistant") == [answers]


def test_reasoning_in_a_key_of_its_own_belongs_to_its_role(tokenizer: Any) -> None:
    template = TURNS.replace(
        "BODY", "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}"
    )
    ids, roles = tokenize_chat(tokenizer, [said("assistant", "yes", reasoning_content="hm")], template)
    assert words_by_role(tokenizer, ids, roles, "assistant") == ["hmyes"]


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content[:3] }}",
        "{{ m.content | upper }}",
        "{{ m.content.split('</think>')[0] }}",
        "",
        "{{ m.content.x.y }}",
    ],
)
def test_a_chat_whose_words_a_template_changes_is_refused(tokenizer: Any, body: str) -> None:
    with pytest.raises(Refused, match="the chat template"):
        tokenize_chat(tokenizer, [said("assistant", "<think>well</think>yes")], TURNS.replace("BODY", body))


# ------------------------------------------------------------------------------------------------------ today's date


@pytest.mark.parametrize("form", ["%d %b %Y", "%B %-d, %Y", "%Y-%m-%d %H:%M, 100%%", "%A (%j)"])
def test_a_dated_template_writes_that_day_whatever_the_clock_says(tokenizer: Any, form: str) -> None:
    template = f"\n{{{{ bos_token }}}}{{% if strftime_now is defined %}}{{{{ strftime_now('{form}') }}}}{{% endif %}}"
    shown = tokenizer.apply_chat_template(
        [said("user", "x")], chat_template=dated(template, "2024-07-06"), tokenize=False
    )
    assert shown == "\n<bos>" + datetime.datetime(2024, 7, 6).strftime(form)


def test_a_template_that_loops_is_one_line(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TIME_LIMIT", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(
        InputError, match=r"^the chat template has not ended after 0\.2 s on one dialogue; it may loop forever"
    ):
        tokenize_chat(tokenizer, [said("user", "hi")], loop)
    with pytest.raises(Refused, match="Range too big"):
        tokenize_chat(tokenizer, [said("user", "hi")], "{% for i in range(10**12) %}{% endfor %}")


def test_a_template_without_a_date_is_not_touched() -> None:
    assert dated(CHAT_TEMPLATE, "2024-07-06") is CHAT_TEMPLATE


class Clock(datetime.datetime):
    day_of_month = 1

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime(2026, 11, cls.day_of_month)


@pytest.fixture
def today(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a cache of chats in a template that writes today's date; `Clock` is the clock."""
    import transformers.utils.chat_template_utils as utils

    monkeypatch.setattr(utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "day_of_month", 1)
    (tmp_path / "today.jinja").write_text(TODAY)
    rows = [{"messages": [said("user", f"hi {i}"), said("assistant", "the name")]} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": str(tmp_path / "d.jsonl"), "chat_template": str(tmp_path / "today.jinja")}


def test_parts_made_on_two_days_merge_to_the_cache_of_either_day(
    pair: Pair, tmp_path: Path, today: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = cache_activations(pair.config(tmp_path / "whole", **today))
    for number in (1, 2):
        Clock.day_of_month = number
        run_cache(pair.config(tmp_path / str(number), **today), part=Part(number, 2))
    merge_parts([str(tmp_path / "1"), str(tmp_path / "2")], str(tmp_path / "merged"))
    merged = ActivationCache(tmp_path / "merged")
    assert merged.manifest_hash == whole.manifest_hash
    assert merged.manifest["template_date"] == "2024-07-26"
    assert "the chat template writes a date: 2024-07-26 (--template-date)" in capsys.readouterr().err
    cache_activations(pair.config(tmp_path / "whole", **today))  # the same command on another day
    tokenizer = AutoTokenizer.from_pretrained(pair.tuned)
    tokens = merged.read(0, 60)
    first = tokens.token_ids[tokens.document_ids == tokens.document_ids[0]].tolist()
    assert tokenizer.decode(first).startswith("Today: 26 Jul 2024\n<start_of_turn>user\nhi")


def test_another_date_is_another_cache_and_is_named(pair: Pair, tmp_path: Path, today: dict[str, Any]) -> None:
    cache_activations(pair.config(tmp_path / "c", **today))
    with pytest.raises(InputError, match=r"another template_date \('2024-07-26', now '2025-01-01'\)"):
        cache_activations(pair.config(tmp_path / "c", template_date="2025-01-01", **today))
    with pytest.raises(InputError, match="template_date is 'Friday'; give a date such as 2024-07-26"):
        pair.config(tmp_path / "c", template_date="Friday")


def test_causal_chats_and_nulls_have_the_date_of_the_cache(
    pair: Pair, tmp_path: Path, today: dict[str, Any], tokenizer: Any
) -> None:
    cache = cache_activations(pair.config(tmp_path / "c", template_date="2025-01-01", **today))
    Clock.day_of_month = 2
    (chat,) = read_chats(cache.config.data_config(), tokenizer, 1)
    assert "Today: 01 Jan 2025" in tokenizer.decode(chat.ids.tolist())
    assert "Today: 01 Jan 2025" in tokenizer.decode(tokenize_prompt(tokenizer, "hi", TODAY, date="2025-01-01"))
    from conftest import make_model, make_tokenizer

    make_model(tmp_path / "placebo", seed=5)
    make_tokenizer(tmp_path / "placebo")
    made = null_cache(cache, str(tmp_path / "placebo"), tmp_path / "null", "cpu")
    assert made.manifest["token_hash"] == cache.manifest["token_hash"]


def test_a_null_on_changed_data_is_refused_before_anything_is_cached(
    pair: Pair, tmp_path: Path, today: dict[str, Any]
) -> None:
    from conftest import make_model, make_tokenizer

    cache = cache_activations(pair.config(tmp_path / "c", **today))
    Path(today["data"]).write_text(Path(today["data"]).read_text().replace("name", "size"))
    make_model(tmp_path / "placebo", seed=5)
    make_tokenizer(tmp_path / "placebo")
    with pytest.raises(InputError, match=r"the data of cache .* changed"):
        null_cache(cache, str(tmp_path / "placebo"), tmp_path / "null", "cpu")
    assert not (tmp_path / "null").exists()


def test_a_wrong_share_of_refused_rows_is_refused() -> None:
    with pytest.raises(InputError, match="max_refused is 2; give a number from 0 to 1"):
        DataConfig(data="x", n_tokens=1, max_refused=2)
