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
from crosscoders.text.settings import DataSource

RESERVED_GROUP = "template"
"""Context of the tokens of a chat template, whatever document they stand in."""
LOCAL_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


class Document(NamedTuple):
    """One text or one chat."""

    content: str | list[dict[str, str]]
    """Plain text, or messages of the form {"role": ..., "content": ...}."""
    group: str
    """Name under which it is counted."""
    where: str = ""
    """Row and file, for messages."""


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
    """Yield the documents of one source; empty ones are passed over.

    Raises:
        InputError: nothing is at that path, or rows have neither the text nor the messages column.
    """
    path = Path(source.path)
    if path.exists():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(LOCAL_SUFFIXES)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"no file in {source.path!r} ends with one of {', '.join(LOCAL_SUFFIXES)}.")
        for file in files:
            rows = _readable(_read_file(file), file)
            yield from _documents(rows, source, str(file), default_group=file.name.split(".")[0])
    elif source.path.endswith(LOCAL_SUFFIXES) or source.path.startswith((".", "/", "~")):
        raise InputError(
            f"data file {source.path!r} does not exist. Check the path (it is taken from the current folder)."
        )
    else:
        yield from _documents(_read_hub(source), source, source.path, default_group=source.path)


def _readable(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows, with one line for a file that is not what its name says."""
    try:
        yield from rows
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:  # UnicodeDecodeError and ArrowInvalid are ValueErrors
        raise InputError(f"{str(file)!r} cannot be read as its name says: {error}. Write it again as UTF-8.") from None


def _documents(
    rows: Iterable[dict[str, Any]], source: DataSource, place: str, default_group: str
) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of {place!r}"
        group = source.group or str(row.get("group") or default_group)
        if group == RESERVED_GROUP:
            raise InputError(f"group {group!r} in {where} is the name of chat-template tokens. Name it otherwise.")
        if row.get(source.messages_column) is not None:
            messages = _checked_messages(row[source.messages_column], source, where)
            _require_unicode([group, *(m["content"] for m in messages)], where)
            yield Document(messages, group, where)
        elif source.text_column in row:
            text = row[source.text_column]
            if text is not None and not isinstance(text, str):
                raise InputError(f"column {source.text_column!r} in {where} holds {text!r}, not text. Convert it.")
            if text and text.strip():
                _require_unicode([group, text], where)
                yield Document(text, group, where)
        else:
            wanted, columns = source.text_column, sorted(row)
            raise InputError(
                f"{where} has no column {wanted!r} and no {source.messages_column!r}; "
                f"its columns are {', '.join(columns) or 'none'}{nearest(wanted, columns)} "
                "Set text_column or messages_column of this data source."
            )


def _require_unicode(texts: list[str], where: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"the text in {where} holds half a character (a lone surrogate). Mend or remove it."
            ) from None


def _checked_messages(messages: Any, source: DataSource, where: str) -> list[dict[str, str]]:
    messages = list(messages) if isinstance(messages, Iterable) else []
    ok = messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not ok:
        raise InputError(
            f"column {source.messages_column!r} in {where} is not a list of "
            '{"role": ..., "content": ...} with text in both. Convert it, or set text_column instead.'
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _read_file(file: Path) -> Iterator[dict[str, Any]]:
    if file.name.endswith(".parquet"):
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    elif file.name.endswith(".txt"):
        # Documents of a text file are separated by blank lines.
        yield from ({"text": part} for part in file.read_text(encoding="utf-8-sig").split("\n\n"))
    elif file.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if file.name.endswith(".gz") else open)(file, "rt", encoding="utf-8-sig") as lines:
            for i, line in enumerate(lines):
                if line.strip():
                    yield _json_row(line, file, i)
    else:
        raise InputError(f"{str(file)!r} is of no known kind; use one of {', '.join(LOCAL_SUFFIXES)}.")


def _json_row(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"line {number + 1} of {str(file)!r} is not JSON ({error.msg}). Mend or remove it.") from None
    if not isinstance(row, dict):
        raise InputError(f"line {number + 1} of {str(file)!r} is not a JSON object with a text or messages column.")
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
