"""How the demo models are trained: documents packed into rows, AdamW with a cosine, one seed.

Reading order: `text_documents` and `dialogue_documents` make token ids with a mask of scored tokens, `packed_rows`
fills rows with whole documents, `row_stream` repeats that without end, `make_batch` and `next_token_loss` are what
`train_model` hands to `diffing.finetuning`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from diffing.finetuning import Schedule, finetune

CONTEXT = 128
"""Tokens in a row, and the longest document that the models are trained on."""
ROWS = 16
"""Rows in a step: 2,048 tokens."""
PACKING_WINDOW = 512
"""Documents that are packed together; at this size rows are about 98 % full."""


@dataclass(frozen=True)
class Recipe(Schedule):
    """Schedule and data of one model."""

    raw_rows: int = ROWS
    """Rows of raw text in each step; the others hold dialogues."""


class Document(NamedTuple):
    """Token ids, and which of them are predicted for the loss."""

    ids: list[int]
    scored: list[bool]


class Batch(NamedTuple):
    """Packed rows; a document sees only itself."""

    ids: Int[Tensor, "rows seq"]
    scored: Bool[Tensor, "rows seq"]
    segments: Int[Tensor, "rows seq"]
    """Number of the document within its row, from 1; padding is 0."""
    positions: Int[Tensor, "rows seq"]
    """Position within the document."""


def text_documents(tokenizer: Any, texts: list[str]) -> list[Document]:
    """Return documents `<bos>` text `<eos>`, cut at the context; all but `<bos>` is scored."""
    rows = ([*ids, tokenizer.eos_token_id][:CONTEXT] for ids in tokenizer(texts)["input_ids"])
    return [Document(ids, [False] + [True] * (len(ids) - 1)) for ids in rows]


def dialogue_documents(tokenizer: Any, chats: list[list[dict[str, str]]]) -> list[Document]:
    """Return questions and answers in the chat template; only the answer and its `<end_of_turn>` are scored."""
    prompts = tokenizer.apply_chat_template([chat[:1] for chat in chats], add_generation_prompt=True, tokenize=False)
    answers = [f"{chat[1]['content']}<end_of_turn>" for chat in chats]
    prompt_ids, answer_ids = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers))
    return [
        Document([*prompt, *answer][:CONTEXT], ([False] * len(prompt) + [True] * len(answer))[:CONTEXT])
        for prompt, answer in zip(prompt_ids, answer_ids, strict=True)
    ]


def packed_rows(documents: list[Document]) -> list[list[Document]]:
    """Put whole documents into rows of CONTEXT tokens: longest first, each into the first row with room."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda d: len(d.ids), reverse=True):
        size = len(document.ids)
        place = next((i for i, free in enumerate(room) if free >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(CONTEXT)
        rows[place].append(document)
        room[place] -= size
    return rows


def row_stream(documents: list[Document], generator: random.Random) -> Iterator[list[Document]]:
    """Yield rows without end; every epoch has a new order and a new packing."""
    order = list(documents)
    while True:
        generator.shuffle(order)
        windows = [packed_rows(order[i : i + PACKING_WINDOW]) for i in range(0, len(order), PACKING_WINDOW)]
        rows = [row for window in windows for row in window]
        generator.shuffle(rows)
        yield from rows


def make_batch(rows: list[list[Document]]) -> Batch:
    """Return tensors of packed rows, padded with 0."""
    shape = (len(rows), CONTEXT)
    ids, segments, positions = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    scored = torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, 1):
            span = slice(start, start + len(document.ids))
            ids[r, span] = torch.tensor(document.ids)
            scored[r, span] = torch.tensor(document.scored)
            segments[r, span] = number
            positions[r, span] = torch.arange(len(document.ids))
            start = span.stop
    return Batch(ids, scored, segments, positions)


def next_token_loss(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over scored tokens, in nats per token; logits are computed only where they are
    scored."""
    causal = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    seen = causal & (batch.segments[:, :, None] == batch.segments[:, None, :])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    masks = {"full_attention": mask, "sliding_attention": mask}
    hidden = model.model(batch.ids, attention_mask=masks, position_ids=batch.positions, use_cache=False)[0]
    targets = batch.scored[:, 1:]
    cap = model.config.final_logit_softcapping
    logits = cap * torch.tanh(model.lm_head(hidden[:, :-1][targets]) / cap)
    return functional.cross_entropy(logits, batch.ids[:, 1:][targets])


def train_model(
    model: Any, *, raw: list[Document], dialogues: list[Document], recipe: Recipe, seed: int, name: str
) -> None:
    """Train a model in place.

    Raises:
        CorruptData: the loss is not finite.
    """
    # betas and decay: the usual ones for small language models.
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    finetune(
        model,
        _batches(raw, dialogues, recipe.raw_rows, seed),
        lambda batch: next_token_loss(model, batch),
        optimizer,
        recipe,
        tokens_per_step=ROWS * CONTEXT,
        name=name,
    )


def _batches(raw: list[Document], dialogues: list[Document], raw_rows: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end, `raw_rows` rows of raw text before the rows of dialogues."""
    streams = (row_stream(raw, random.Random(f"{seed}:raw")), row_stream(dialogues, random.Random(f"{seed}:chat")))
    while True:
        rows = [next(streams[0]) for _ in range(raw_rows)]
        yield make_batch(rows + [next(streams[1]) for _ in range(ROWS - raw_rows)])
