"""Step 1 of the data flow: documents -> rows of token ids with roles and a mask of scored positions.

Both models get the same ids. A token is scored, that is cached and counted, when it is neither padding nor (by default)
the beginning-of-sequence token; the mask goes by token id, never by position. Rows are documents, cut at the context
length; padding exists only inside a batch (`pad_rows`).

Reading order: `tokenize_text` and `tokenize_chat` make one row, `tokenize_documents` all of them up to the budget,
`Rows.batches` groups rows of similar length, `pad_rows` makes the tensors that both models read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from crosscoders.common.errors import InputError
from crosscoders.text.documents import Document, read_documents
from crosscoders.text.padding import Batch, make_batch
from crosscoders.text.settings import DataConfig

ROLES = ("text", "template", "user", "assistant", "system")
"""What a token belongs to: plain text, the chat template, or the content of a message."""


class Row(NamedTuple):
    """The tokens of one document."""

    ids: list[int]
    roles: list[int]
    n_cut: int
    """Tokens beyond the context length, which are left out."""


class Rows(NamedTuple):
    """All documents of a plan, end to end in flat arrays."""

    ids: Int[np.ndarray, " tokens"]
    roles: UInt8[np.ndarray, " tokens"]
    scored: Bool[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " rows_and_one"]
    """Row i is tokens offsets[i] to offsets[i + 1]."""
    groups: Int[np.ndarray, " rows"]
    group_names: list[str]
    n_scored: int
    counts: dict[str, int]
    """documents, empty_documents, tokens, scored_tokens, cut_tokens."""

    def batches(self, batch_rows: int) -> list[Int[np.ndarray, " _"]]:
        """Return the row numbers of each forward pass: rows of similar length together, so that padding is rare.

        Rows are sorted by length within windows of 64 batches, and the batches of a window are permuted, so that no
        stretch of the cache holds only short or only long documents.
        """
        lengths = np.diff(self.offsets)
        window = 64 * batch_rows
        shuffled: list[Int[np.ndarray, " _"]] = []
        for start in range(0, len(lengths), window):
            order = start + np.argsort(lengths[start : start + window], kind="stable")
            batches = [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]
            shuffled.extend(batches[i] for i in np.random.default_rng(start).permutation(len(batches)))
        return shuffled

    def packed(self, n_rows: int, length: int) -> "Rows":
        """Return all documents end to end, each with its BOS, cut into `n_rows` sequences of `length` tokens."""
        n = n_rows * length
        return self._replace(
            ids=self.ids[:n], roles=self.roles[:n], scored=self.scored[:n], offsets=np.arange(0, n + 1, length),
            groups=np.zeros(n_rows, dtype=np.int64), n_scored=int(self.scored[:n].sum()),
        )  # fmt: skip

    def scored_in_row(self) -> Int[np.ndarray, " rows"]:
        """Count the scored tokens of each row."""
        return np.add.reduceat(self.scored.astype(np.int64), self.offsets[:-1])


def special_ids(tokenizer: Any, *, drop_bos: bool) -> list[int]:
    """Return the ids that are never scored. Padding is known by the attention mask, since some models pad with another
    token."""
    return [tokenizer.bos_token_id] if drop_bos and tokenizer.bos_token_id is not None else []


def tokenize_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the ids and roles of plain text, with exactly one beginning-of-sequence token where there is one."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids, [0] * len(ids)


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of one user message in the chat template, up to where the answer begins, or of plain text where
    the tokenizer has no template; with one beginning-of-sequence token where there is one."""
    if not tokenizer.chat_template:
        return tokenize_text(tokenizer, prompt)[0]
    chat = [{"role": "user", "content": prompt}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return _one_bos(tokenizer, list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]))


def tokenize_chat(
    tokenizer: Any, messages: list[dict[str, str]], template: str | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids and roles of a chat in the tuned model's template; every token outside a message's content is
    template.

    The template itself writes the beginning-of-sequence token, so none is added.

    Raises:
        InputError: the template refuses the chat, or does not show a message's content.
    """
    import jinja2

    def render(chat: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))

    try:
        rendered = render(messages)
        spans = _content_spans(render, messages, rendered)
    except jinja2.TemplateError as error:
        raise InputError(
            f"the chat template refuses a dialogue: {error}. Mend the dialogue, or give --chat-template."
        ) from None
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    role_of_char = np.full(len(rendered) + 1, ROLES.index("template"), dtype=np.uint8)
    for message, (start, stop) in zip(messages, spans, strict=True):
        role_of_char[start:stop] = _role_number(message["role"])
    roles = [int(role_of_char[start]) for start, _ in encoded["offset_mapping"]]
    ids = _one_bos(tokenizer, ids)
    return ids, roles[-len(ids) :]


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the ids of a chat without what a template repeats of the beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _content_spans(
    render: Callable[[list[dict[str, str]]], str], messages: list[dict[str, str]], rendered: str
) -> list[tuple[int, int]]:
    """Return where each message's content stands in the rendered chat.

    The chat is rendered once more with a mark in place of every content, so that a content such as "user" is not taken
    for the template's own word. Templates either trim contents or do not; one that changes them otherwise is refused.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    for change in (str.strip, str):
        built, rest, spans = "", marked, []
        for message, mark in zip(messages, marks, strict=True):
            before, _, rest = rest.partition(mark)
            start = len(built) + len(before)
            built += before + change(message["content"])
            spans.append((start, len(built)))
        if built + rest == rendered:
            return spans
    raise InputError(
        "the chat template drops or changes the content of a message. Give another one: --chat-template FILE"
    )


def _role_number(role: str) -> int:
    names = {"model": "assistant"}
    name = names.get(role, role)
    return ROLES.index(name) if name in ROLES[2:] else ROLES.index("user")


def tokenize_documents(config: DataConfig, tokenizer: Any) -> Rows:
    """Read and tokenise documents until `n_tokens` are scored, before any model loads.

    Raises:
        InputError: the data holds no text, or ends before the budget; a chat has no template.
    """
    template = read_template(config.chat_template)
    dropped = np.array(special_ids(tokenizer, drop_bos=config.drop_bos), dtype=np.int32)
    built = _Builder(dropped)

    def add(document: Document) -> int:
        return built.add(document, _row(document, tokenizer, template, config.context_length))

    documents = read_documents(
        config.sources(), shuffle_window=config.shuffle_documents, seed=config.seed, count_tokens=add
    )
    for _ in documents:
        if built.n_scored >= config.n_tokens:
            break
    if not built.n_scored:
        raise InputError(f"the data holds no text: {config.paths()}. Name data with documents.")
    if built.n_scored < config.n_tokens:
        raise InputError(
            f"the data has only {built.n_scored:,} scored tokens in {len(built.groups):,} documents but n_tokens is "
            f"{config.n_tokens:,}. Set --n-tokens {built.n_scored}, or add data."
        )
    return built.finish()


class _Builder:
    """Collects rows; kept apart so that memory holds flat arrays only."""

    def __init__(self, dropped: Int[np.ndarray, " specials"]) -> None:
        self.dropped = dropped
        self.ids: list[np.ndarray] = []
        self.roles: list[np.ndarray] = []
        self.scored: list[np.ndarray] = []
        self.groups: list[int] = []
        self.names: dict[str, int] = {}
        self.n_scored = self.n_cut = self.n_empty = 0

    def add(self, document: Document, row: Row) -> int:
        ids = np.array(row.ids, dtype=np.int32)
        scored = ~np.isin(ids, self.dropped)
        n_scored = int(scored.sum())
        if not n_scored:
            self.n_empty += 1
            return 1  # a source of empty documents must not be asked again for ever
        self.ids.append(ids)
        self.roles.append(np.array(row.roles, dtype=np.uint8))
        self.scored.append(scored)
        self.groups.append(self.names.setdefault(document.group, len(self.names)))
        self.n_scored += n_scored
        self.n_cut += row.n_cut
        return n_scored

    def finish(self) -> Rows:
        lengths = [len(ids) for ids in self.ids]
        counts = {
            "documents": len(lengths),
            "empty_documents": self.n_empty,
            "tokens": sum(lengths),
            "scored_tokens": self.n_scored,
            "cut_tokens": self.n_cut,
        }
        return Rows(
            ids=np.concatenate(self.ids),
            roles=np.concatenate(self.roles),
            scored=np.concatenate(self.scored),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            groups=np.array(self.groups, dtype=np.int64),
            group_names=list(self.names),
            n_scored=self.n_scored,
            counts=counts,
        )


def _row(document: Document, tokenizer: Any, template: str | None, context_length: int) -> Row:
    if isinstance(document.content, str):
        ids, roles = tokenize_text(tokenizer, document.content)
    elif template is None and not tokenizer.chat_template:
        raise InputError(
            "the data holds chats but neither model's tokenizer has a chat template. Give one: --chat-template FILE"
        )
    else:
        try:
            ids, roles = tokenize_chat(tokenizer, document.content, template)
        except InputError as error:
            raise InputError(f"{document.where}: {error}") from None
    return Row(ids[:context_length], roles[:context_length], max(0, len(ids) - context_length))


def pad_rows(rows: Rows, numbers: Int[np.ndarray, " rows_of_batch"], pad_id: int) -> Batch:
    """Return some of the rows as one batch."""
    spans = [slice(rows.offsets[i], rows.offsets[i + 1]) for i in numbers]
    return make_batch([rows.ids[span] for span in spans], [rows.scored[span] for span in spans], numbers, pad_id)


def read_template(path: str | None) -> str | None:
    """Read the text of a chat template file."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"chat template {path!r} does not exist. Check the path of --chat-template.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"chat template {path!r} is not text. Give a Jinja file in UTF-8.") from None


def iterate_scored(rows: Rows, batches: list[Int[np.ndarray, " _"]]) -> Iterator[tuple[int, int]]:
    """Yield the (first, last + 1) scored token of each batch in the order in which they are cached."""
    per_row = rows.scored_in_row()
    start = 0
    for numbers in batches:
        stop = start + int(per_row[numbers].sum())
        yield start, stop
        start = stop
