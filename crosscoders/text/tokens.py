"""Step 1 of the data flow: documents -> rows of token ids with roles and a mask of scored positions.

Both models get the same ids. A token is scored, that is cached and counted, when it is neither padding nor (by default)
the beginning-of-sequence token, nor one of the first `skip_first` positions (`crosscoders.text.positions`). Rows are
documents, cut at the context length; padding exists only inside a batch (`pad_rows`).

Reading order: `tokenize_text` and `tokenize_chat` make one row, `tokenize_documents` all of them up to the budget,
`Rows.batches` groups rows of similar length, `pad_rows` makes the tensors that both models read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.seals import checksum
from crosscoders.text.documents import Document, read_documents
from crosscoders.text.padding import Batch, make_batch
from crosscoders.text.positions import scored_positions
from crosscoders.text.refusals import Refusals, Refused
from crosscoders.text.settings import TEMPLATE_DATE, DataConfig
from crosscoders.text.templates import Message, content_spans, renderer, require_template

ROLES = ("text", "template", "user", "assistant", "system", "tool")
"""What a token belongs to: plain text, the chat template, or the content of a message."""
_ROLE_NAMES = {"model": "assistant", "developer": "system", "ipython": "tool", "function": "tool"}
"""Other names of roles; any other counts as user."""


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
    """documents, empty_documents, tokens, scored_tokens, skipped_tokens, cut_tokens."""
    refused: dict[str, int]
    """Rows of the data that were left out, by reason."""

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

    def token_hash(self) -> str:
        """Return sha256 over the checksums of ids, roles, scored positions, borders and groups of all documents."""
        arrays = (self.ids, self.roles, self.scored, self.offsets, self.groups)
        return files.hash_json([checksum(array.tobytes()) for array in arrays])

    def packed(self, n_rows: int, length: int) -> "Rows":
        """Return all documents end to end, cut into `n_rows` sequences of `length` tokens."""
        n = n_rows * length
        return self._replace(
            ids=self.ids[:n], roles=self.roles[:n], scored=self.scored[:n], offsets=np.arange(0, n + 1, length),
            groups=np.zeros(n_rows, dtype=np.int64), n_scored=int(self.scored[:n].sum()),
        )  # fmt: skip

    def scored_in_row(self) -> Int[np.ndarray, " rows"]:
        """Count the scored tokens of each row."""
        return np.add.reduceat(self.scored.astype(np.int64), self.offsets[:-1])


def tokenize_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return ids and roles of plain text, beginning with exactly one beginning-of-sequence token where there is one.

    Other control tokens that stand in the text, such as <eos>, are read as the tokenizer reads them.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    ids = _one_bos(tokenizer, ids)
    return ids, [0] * len(ids)


def tokenize_prompt(
    tokenizer: Any, prompt: str | list[Message], template: str | None = None, *, date: str = TEMPLATE_DATE
) -> list[int]:
    """Return the ids of a user message or of a chat in the chat template, up to where the answer begins unless the last
    message is one, or of plain text where there is no template; with one beginning-of-sequence token where one exists.

    Raises:
        Refused: the template refuses the message.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if template is None and not tokenizer.chat_template:
        return tokenize_text(tokenizer, "\n".join(str(message["content"]) for message in messages))[0]
    is_prompt = messages[-1]["role"] != "assistant"
    rendered = renderer(tokenizer, template, date=date, is_prompt=is_prompt)(messages)
    return _one_bos(tokenizer, list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]))


def tokenize_chat(
    tokenizer: Any,
    messages: list[Message],
    template: str | None = None,
    *,
    tools: list[Any] | None = None,
    date: str = TEMPLATE_DATE,
) -> tuple[list[int], list[int]]:
    """Return ids and roles of a chat in the tuned model's template; every token outside a message's content is
    template, tool calls and the list of tools too.

    The template itself writes the beginning-of-sequence token, so none is added. date: what it takes for today.

    Raises:
        Refused: the template refuses the chat, or does not show a message's content.
    """
    render = renderer(tokenizer, template, date=date, tools=tools)
    rendered = render(messages)
    spans = content_spans(render, messages, rendered)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    role_of_char = np.full(len(rendered) + 1, ROLES.index("template"), dtype=np.uint8)
    for span in spans:
        role_of_char[span.start : span.stop] = _role_number(messages[span.message]["role"])
    roles = [int(role_of_char[start]) for start, _ in encoded["offset_mapping"]]
    ids = _one_bos(tokenizer, list(encoded["input_ids"]))
    return ids, roles[len(roles) - len(ids) :]


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the ids without what a text or template repeats of the beginning-of-sequence token at its start."""
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _role_number(role: str) -> int:
    name = _ROLE_NAMES.get(role, role)
    return ROLES.index(name) if name in ROLES[2:] else ROLES.index("user")


def tokenize_documents(config: DataConfig, tokenizer: Any) -> Rows:
    """Read and tokenise documents until `n_tokens` are scored, before any model loads.

    Raises:
        InputError: the data holds no text, or ends before the budget; a chat has no template; too many rows cannot be
            read; drop_bos is false where there is no BOS.
    """
    template, bos = read_template(config.chat_template), tokenizer.bos_token_id
    if bos is None and not config.drop_bos:
        raise InputError(
            "drop_bos false has no effect: the tokenizer has no beginning-of-sequence token. Remove it; "
            "--skip-first 0 keeps the first position of each row."
        )
    built = _Builder(bos, drop_bos=config.drop_bos, skip_first=config.skip_first)
    refusals = Refusals(config.max_refused)

    def add(document: Document) -> int:
        refusals.n_rows += 1
        try:
            ids, roles = tokenize_document(document, tokenizer, template, config.template_date)
        except Refused as refused:
            refusals.add(refused)
            return 1  # as of an empty document
        length = config.context_length
        return built.add(document, Row(ids[:length], roles[:length], max(0, len(ids) - length)))

    documents = read_documents(
        config.sources(), shuffle_window=config.shuffle_documents, seed=config.seed, count_tokens=add
    )
    for _ in documents:
        if built.n_scored >= config.n_tokens:
            break
    refused = refusals.finish()
    if not built.n_scored:
        raise InputError(f"the data holds no text: {config.paths()}. Name data with documents.")
    if built.n_scored < config.n_tokens:
        raise InputError(
            f"the data has only {built.n_scored:,} scored tokens in {len(built.groups):,} documents but n_tokens is "
            f"{config.n_tokens:,}. Set --n-tokens {built.n_scored}, or add data."
        )
    return built.finish(refused)


class _Builder:
    """Collects rows; kept apart so that memory holds flat arrays only."""

    def __init__(self, bos: int | None, *, drop_bos: bool, skip_first: int | None) -> None:
        self.bos, self.drop_bos, self.skip_first = bos, drop_bos, skip_first
        self.ids: list[np.ndarray] = []
        self.roles: list[np.ndarray] = []
        self.scored: list[np.ndarray] = []
        self.groups: list[int] = []
        self.names: dict[str, int] = {}
        self.n_scored = self.n_cut = self.n_empty = self.n_skipped = 0

    def add(self, document: Document, row: Row) -> int:
        ids = np.array(row.ids, dtype=np.int32)
        scored = scored_positions(ids, self.bos, drop_bos=self.drop_bos, skip_first=self.skip_first)
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
        self.n_skipped += int((~scored & (ids != self.bos)).sum())
        return n_scored

    def finish(self, refused: dict[str, int]) -> Rows:
        lengths = [len(ids) for ids in self.ids]
        counts = {
            "documents": len(lengths),
            "empty_documents": self.n_empty,
            "tokens": sum(lengths),
            "scored_tokens": self.n_scored,
            "skipped_tokens": self.n_skipped,
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
            refused=refused,
        )


def tokenize_document(
    document: Document, tokenizer: Any, template: str | None, date: str
) -> tuple[list[int], list[int]]:
    """Return ids and roles of a text or a chat, not cut.

    Raises:
        Refused: the row cannot be read; row and file are named.
        InputError: there is no chat template.
    """
    if document.refused is not None:
        raise document.refused
    if isinstance(document.content, str):
        return tokenize_text(tokenizer, document.content)
    require_template(tokenizer, template)
    try:
        return tokenize_chat(tokenizer, document.content, template, tools=document.tools, date=date)
    except Refused as refused:
        raise Refused(refused.reason, f"{document.where}: {refused}") from None


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
