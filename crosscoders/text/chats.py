"""Documents for causal measurements: chats whose responses are predicted, cut and padded like those of the cache."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.text.documents import read_documents
from crosscoders.text.padding import Batch, make_batch, pad
from crosscoders.text.positions import scored_positions
from crosscoders.text.refusals import Refusals, Refused
from crosscoders.text.settings import DataConfig
from crosscoders.text.tokens import ROLES, read_template, tokenize_document

TEMPLATE, RESPONSE = ROLES.index("template"), ROLES.index("assistant")


class Chat(NamedTuple):
    """Token ids of one chat and what each of them belongs to."""

    ids: Int[np.ndarray, " seq"]
    roles: Int[np.ndarray, " seq"]
    scored: Bool[np.ndarray, " seq"]
    """Cached, encoded and patched; the others keep the target's own activation."""


class ChatBatch(NamedTuple):
    """Chats side by side."""

    tokens: Batch
    is_template: Bool[Tensor, "rows seq"]
    place: Int[Tensor, "rows seq"]
    """Place of a response token in its response, counted from 1; 0 for every other token, and for a first token, which
    nothing predicts."""


def read_chats(config: DataConfig, tokenizer: Any, n_documents: int) -> list[Chat]:
    """Read the first chats with a response, in the order of documents that `config` makes, tokenised as for its cache.

    Raises:
        InputError: no document has a response, there is no chat template, or too many rows cannot be read.
    """
    template = read_template(config.chat_template)
    chats: list[Chat] = []
    refusals = Refusals(config.max_refused)
    documents = read_documents(
        config.sources(), shuffle_window=config.shuffle_documents, seed=config.seed, count_tokens=lambda _: 1
    )
    for document in documents:
        refusals.n_rows += 1
        if isinstance(document.content, str) and document.refused is None:
            continue
        try:
            parts = tokenize_document(document, tokenizer, template, config.template_date)
        except Refused as refused:
            refusals.add(refused)
            continue
        ids, roles = (np.array(part[: config.context_length]) for part in parts)
        if (roles[1:] == RESPONSE).any():
            scored = scored_positions(
                ids, tokenizer.bos_token_id, drop_bos=config.drop_bos, skip_first=config.skip_first
            )
            chats.append(Chat(ids, roles, scored))
        if len(chats) == n_documents:
            break
    refusals.finish()
    if not chats:
        raise InputError(
            f"no document of {config.paths()} has a response, a message of the role assistant within the context "
            "length. Name chats with --data."
        )
    return chats


def batches(chats: list[Chat], batch_rows: int, pad_id: int) -> list[ChatBatch]:
    """Return all chats, those of similar length together, so that padding is rare; the longest first, so that memory
    runs out at once or not at all."""
    order = sorted(range(len(chats)), key=lambda i: -len(chats[i].ids))
    groups = [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]
    return [_batch([chats[i] for i in group], group, pad_id) for group in groups]


def response_places(roles: Int[np.ndarray, " seq"]) -> Int[np.ndarray, " seq"]:
    """Return 1, 2, 3, ... along each run of response tokens, 0 elsewhere."""
    is_response = roles == RESPONSE
    number = np.cumsum(is_response)
    before = np.maximum.accumulate(np.where(is_response, 0, number))
    return np.where(is_response, number - before, 0)


def _batch(chats: list[Chat], numbers: list[int], pad_id: int) -> ChatBatch:
    place = pad([response_places(chat.roles) for chat in chats], 0, torch.int64)
    place[:, 0] = 0
    return ChatBatch(
        make_batch([chat.ids for chat in chats], [chat.scored for chat in chats], np.array(numbers), pad_id),
        pad([chat.roles == TEMPLATE for chat in chats], 0, torch.bool),
        place,
    )
