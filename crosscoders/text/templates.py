"""Chat templates: today's date in them, and where the words of each message stand in a rendered chat.

`dated` fixes the date, `renderer` writes a chat, `content_spans` finds the words by writing it again with marks in
their place.
"""

import ctypes
import functools
import json
import re
import string
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import datetime
from typing import Any, NamedTuple

from crosscoders.common.errors import InputError
from crosscoders.text.refusals import Refused

Message = dict[str, Any]
"""`role`, `content`, and whatever else the template reads: `tool_calls`, `name`, `reasoning_content`, ..."""
FIELDS = ("reasoning_content", "reasoning", "thinking", "content")
"""Keys of a message whose text is what its role said."""
TIME_LIMIT = 30.0
"""Seconds that a template may take for one dialogue; it takes milliseconds."""
_CLOCK = "strftime_now"
_MARK = re.compile("\ue000(\\d+)\ue001")
_THINK = re.compile(r"(\s*</?think>\s*)")


def writes_date(template: str | dict[str, str] | None) -> bool:
    """Return whether a chat template asks for today's date."""
    return _CLOCK in json.dumps(template)


@functools.lru_cache
def dated(template: str, date: str) -> str:
    """Return the template with midnight of `date` (YYYY-MM-DD) in place of the clock that `strftime_now` reads.

    A macro of that name goes before the template: the library takes no function in place of its own.
    """
    if _CLOCK not in template:
        return template
    day = datetime.fromisoformat(date)
    values = {f"%{letter}": day.strftime(f"%{letter}") for letter in string.ascii_letters}
    values |= {"%-d": str(day.day), "%-m": str(day.month)}
    values = {"%%": "\ue002"} | {code: value for code, value in values.items() if "%" not in value} | {"\ue002": "%"}
    replaced = "".join(f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in values.items())
    # The empty expression keeps the first line end of the template, which trim_blocks takes away after a block.
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def renderer(
    tokenizer: Any, template: str | None, *, date: str, tools: list[Any] | None = None, is_prompt: bool = False
) -> Callable[[list[Message]], str]:
    """Return the function that writes a chat in a template, or in the tokenizer's own.

    is_prompt: up to where the answer begins. The function raises Refused where the template refuses the chat.
    """
    import jinja2

    text = dated(tokenizer.get_chat_template(template, tools), date)

    def render(messages: list[Message]) -> str:
        def written() -> str:
            return str(
                tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=text, add_generation_prompt=is_prompt, tokenize=False
                )
            )

        try:
            return _in_time(written)
        except InputError:  # too slow: of the template, not of this dialogue
            raise
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise Refused(
                "template_error",
                f"the chat template refuses a dialogue: {error}. Mend the dialogue, or give --chat-template.",
            ) from None

    return render


def _in_time(written: Callable[[], str]) -> str:
    """Return what a template writes, or raise what it raises; a thread does it, which is stopped after `TIME_LIMIT`.

    Raises:
        InputError: it has not ended by then.
    """
    result: Future[str] = Future()

    def write() -> None:
        try:
            result.set_result(written())
        except BaseException as error:  # raised again where the chat is wanted
            result.set_exception(error)

    thread = threading.Thread(target=write, name="template", daemon=True)
    thread.start()
    if not wait([result], TIME_LIMIT).done:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise InputError(
            f"the chat template has not ended after {TIME_LIMIT:g} s on one dialogue; it may loop forever. Give "
            "another one: --chat-template FILE"
        )
    return result.result()


class Span(NamedTuple):
    """A part of a rendered chat that one message said."""

    start: int
    stop: int
    message: int
    """Number of the message."""


class _Piece(NamedTuple):
    message: int
    text: str
    is_reasoning: bool


def content_spans(render: Callable[[list[Message]], str], messages: list[Message], rendered: str) -> list[Span]:
    """Return where the words of the messages stand in the rendered chat.

    The chat is rendered again with a mark in place of every text, so that a content such as "user" is not taken for the
    template's own word; a text may be trimmed, or escaped as in JSON. Where that does not fit, reasoning between
    <think> and </think> has marks of its own, as templates move it or leave that of earlier turns out.

    Raises:
        Refused: the template changes a text otherwise, or leaves out something else than reasoning.
    """
    for is_split in (False, True):
        marked, pieces = _marked(messages, is_split)
        spans = _locate(render(marked), pieces, rendered)
        if spans is not None:
            return spans
    raise Refused(
        "content_changed",
        "the chat template drops or changes the content of a message. Give another one: --chat-template FILE",
    )


def _marked(messages: list[Message], is_split: bool) -> tuple[list[Message], list[_Piece]]:
    """Return the messages with marks in place of their texts, and the texts. White space has none: templates ask
    whether a content is empty."""
    pieces: list[_Piece] = []
    marked = []
    for number, message in enumerate(messages):
        changed = dict(message)
        for field in FIELDS:
            text = message.get(field)
            if not isinstance(text, str) or not text.strip():
                continue
            parts = _THINK.split(text) if is_split else [text]
            for i in range(0, len(parts), 2):  # every other one is a tag
                if parts[i].strip():
                    is_reasoning = field != "content" or "</think>" in "".join(parts[i + 1 : i + 2])
                    pieces.append(_Piece(number, parts[i], is_reasoning))
                    parts[i] = f"\ue000{len(pieces) - 1}\ue001"
            changed[field] = "".join(parts)
        marked.append(changed)
    return marked, pieces


def _locate(marked: str, pieces: list[_Piece], rendered: str) -> list[Span] | None:
    """Return where the pieces stand in `rendered`; None where it is not `marked` with the pieces in it."""
    marks = list(_MARK.finditer(marked))
    shown = {int(mark[1]) for mark in marks}
    if any(number not in shown and not piece.is_reasoning for number, piece in enumerate(pieces)):
        return None
    borders = [*(mark.start() for mark in marks), len(marked)]
    at = borders[0]
    if not rendered.startswith(marked[:at]):
        return None
    spans = []
    for mark, border in zip(marks, borders[1:], strict=True):
        piece, after = pieces[int(mark[1])], marked[mark.end() : border]
        text = next((form for form in _forms(piece.text) if rendered.startswith(form + after, at)), None)
        if text is None:
            return None
        spans.append(Span(at, at + len(text), piece.message))
        at += len(text) + len(after)
    return spans if at == len(rendered) else None


def _forms(text: str) -> list[str]:
    """Return what a template may make of a text without changing its words."""
    trimmed = [text, text.strip(), text.rstrip(), text.lstrip()]
    return [*trimmed, *(json.dumps(form, ensure_ascii=False)[1:-1] for form in trimmed)]


def require_template(tokenizer: Any, template: str | None) -> None:
    """Raise InputError unless `template` or the tokenizer's own one can write chats.

    A tokenizer may name several; the one called default is taken.
    """
    if template is not None:
        return
    own = tokenizer.chat_template
    if not own:
        raise InputError(
            "the data holds chats but neither model's tokenizer has a chat template. Give one: --chat-template FILE"
        )
    if isinstance(own, dict) and "default" not in own:
        raise InputError(
            f"the tokenizer has chat templates {', '.join(sorted(own))} and none called default. Save the one that "
            "the model was trained with to a file and give it: --chat-template FILE"
        )
