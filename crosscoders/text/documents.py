"""Step 0 of the data flow: files and datasets -> documents, in an order that is a pure function of the seed.

`read_documents` mixes the sources by their weights; `read_source` reads one of them; a document is a text or a chat.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.errors import InputError, nearest
from crosscoders.text.refusals import Refused
from crosscoders.text.settings import DataSource
from crosscoders.text.templates import Message

RESERVED_GROUP = "template"
"""Context of the tokens of a chat template, whatever document they stand in."""
LOCAL_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")

Row = dict[str, Any] | Refused
"""Columns of one row of a file, or why there are none."""


class Document(NamedTuple):
    """One text or one chat."""

    content: str | list[Message]
    """Plain text, or messages."""
    group: str
    """Name under which it is counted."""
    where: str = ""
    """Row and file, for messages."""
    tools: list[Any] | None = None
    """Tools of a chat, which its template may list."""
    refused: Refused | None = None
    """Why the row cannot be read; it is then no document, but keeps its place among them."""


def read_documents(
    sources: list[DataSource], *, shuffle_window: int, seed: int, count_tokens: Callable[[Document], int]
) -> Iterator[Document]:
    """Yield all documents of all sources; next comes always the source with the fewest tokens for its weight.

    `count_tokens` is called once for each document, in order, and returns its scored tokens.
    """
    streams = [iter(shuffled(read_source(source), shuffle_window, f"{seed}:{i}")) for i, source in enumerate(sources)]
    spent = [0.0] * len(streams)
    open_streams = set(range(len(streams)))
    while open_streams:
        i = min(open_streams, key=lambda j: (spent[j], j))
        document = next(streams[i], None)
        if document is None:
            open_streams.remove(i)
            continue
        spent[i] += count_tokens(document) / sources[i].weight
        yield document


def shuffled(documents: Iterable[Document], window: int, key: str) -> Iterator[Document]:
    """Yield the documents, permuted within consecutive windows; window 0 keeps the order."""
    generator = random.Random(key)
    held: list[Document] = []
    for document in documents:
        held.append(document)
        if len(held) >= window:
            generator.shuffle(held)
            yield from held
            held.clear()
    generator.shuffle(held)
    yield from held


def read_source(source: DataSource) -> Iterator[Document]:
    """Yield the documents of one source; empty texts are passed over, rows that cannot be read are `refused`.

    Raises:
        InputError: nothing is at that path, or a file is not what its name says.
    """
    path = Path(source.path)
    if path.exists():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(LOCAL_SUFFIXES)) if path.is_dir() else [path]
        files = [file for file in files if not file.is_dir()]
        for file in files if path.is_dir() else []:
            if not file.is_file():
                raise InputError(
                    f"{str(file)!r} is a pipe, a device or a link to nothing. Remove it, or name the files."
                )
        if not files:
            raise InputError(f"no file in {source.path!r} ends with one of {', '.join(LOCAL_SUFFIXES)}.")
        for file in files:
            rows = _readable(_read_file(file), file)
            yield from _documents(rows, source, str(file), default_group=file.name.split(".")[0])
    elif (
        source.path.endswith(LOCAL_SUFFIXES)
        or source.path.startswith((".", "/", "~"))
        or ("/" in source.path and path.parent.is_dir())
    ):
        raise InputError(f"data {source.path!r} does not exist. Check the path (it is taken from the current folder).")
    else:
        yield from _documents(_read_hub(source), source, source.path, default_group=source.path)


def _readable(rows: Iterable[Row], file: Path) -> Iterator[Row]:
    """Yield the rows, with one line for a file that is not what its name says."""
    try:
        yield from rows
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:  # UnicodeDecodeError and ArrowInvalid are ValueErrors
        raise InputError(f"{str(file)!r} cannot be read as its name says: {error}. Write it again as UTF-8.") from None


def _documents(rows: Iterable[Row], source: DataSource, place: str, default_group: str) -> Iterator[Document]:
    if source.group == RESERVED_GROUP:
        raise InputError(f"group {source.group!r} of {source.path!r} is the name of chat-template tokens. Rename it.")
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of {place!r}"
        try:
            document = _document(row, source, where, default_group)
        except Refused as refused:
            document = Document("", default_group, where, refused=refused)
        if document is not None:
            yield document


def _document(row: Row, source: DataSource, where: str, default_group: str) -> Document | None:
    """Return the document of one row, None where its text is empty.

    Raises:
        Refused: the row cannot be read.
    """
    if isinstance(row, Refused):
        raise row
    group = source.group or str(row.get("group") or default_group)
    if group == RESERVED_GROUP:
        raise Refused(
            "reserved_group", f"group {group!r} in {where} is the name of chat-template tokens. Name it otherwise."
        )
    wanted = source.text_column
    if row.get(source.messages_column) is not None:
        messages, tools = _checked_messages(row[source.messages_column], source, where), _tools(row, where)
        _require_unicode([group, json.dumps([messages, tools], ensure_ascii=False, default=str)], where)
        return Document(messages, group, where, tools)
    if wanted not in row:
        columns = sorted(row)
        raise Refused(
            "no_column",
            f"{where} has no column {wanted!r} and no {source.messages_column!r}; "
            f"its columns are {', '.join(columns) or 'none'}{nearest(wanted, columns)} "
            "Set text_column or messages_column of this data source.",
        )
    text = row[wanted]
    if text is not None and not isinstance(text, str):
        raise Refused("no_text", f"column {wanted!r} in {where} holds {text!r}, not text. Convert it.")
    if not text or not text.strip():
        return None
    _require_unicode([group, text], where)
    return Document(text, group, where)


def _require_unicode(texts: list[str], where: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused(
                "no_unicode", f"the text in {where} holds half a character (a lone surrogate). Mend or remove it."
            ) from None


def _checked_messages(messages: Any, source: DataSource, where: str) -> list[Message]:
    """Return the messages with all that they hold but nulls; a tool call may stand in place of a content."""
    listed = [dict(m) if isinstance(m, dict) else {} for m in messages] if isinstance(messages, Iterable) else []
    for message in listed:
        if message.get("tool_calls") and message.get("content") is None:
            message["content"] = ""
    if not listed or not all(isinstance(m.get(key), str) for m in listed for key in ("role", "content")):
        raise Refused(
            "no_messages",
            f"column {source.messages_column!r} in {where} is not a list of "
            '{"role": ..., "content": ...} with text in both. Convert it, or set text_column instead.',
        )
    return [{key: value for key, value in message.items() if value is not None} for message in listed]


def _tools(row: dict[str, Any], where: str) -> list[Any] | None:
    """Return the column `tools`, a list or the JSON of one."""
    tools: Any = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError:
        tools = tools.strip() or []
    if not isinstance(tools, list):
        raise Refused("no_messages", f"column 'tools' in {where} is not a list of tools. Convert or remove it.")
    return tools or None


def _read_file(file: Path) -> Iterator[Row]:
    if file.name.endswith(".parquet"):
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    elif file.name.endswith(".txt"):
        # Documents of a text file are separated by blank lines.
        yield from ({"text": part} for part in file.read_text(encoding="utf-8-sig").split("\n\n"))
    elif file.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if file.name.endswith(".gz") else open)(file, "rb") as lines:
            for i, line in enumerate(lines):
                if line.strip():
                    yield _json_row(line, file, i)
    else:
        raise InputError(f"{str(file)!r} is of no known kind; use one of {', '.join(LOCAL_SUFFIXES)}.")


def _json_row(line: bytes, file: Path, number: int) -> Row:
    where = f"line {number + 1} of {str(file)!r}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return Refused("broken_json", f"{where} is not JSON ({error.msg}). Mend or remove it.")
    except UnicodeDecodeError:
        return Refused("broken_json", f"{where} is not JSON in UTF-8. Write it again.")
    except RecursionError:
        return Refused("broken_json", f"{where} is not JSON (too deep). Mend or remove it.")
    if not isinstance(row, dict):
        return Refused("broken_json", f"{where} is not a JSON object with a text or messages column.")
    return row


def _read_hub(source: DataSource) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(source.path, source.name, split=source.split, streaming=True)
    except (ValueError, OSError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"data {source.path!r} is neither a local path nor a dataset that can be read ({cause}). "
            "Check its name, name and split, and the network."
        ) from None
