"""Documents for causal measurements: chats whose responses are predicted, cut and padded like those of the cache."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosscoders.activations.settings import CacheConfig
from crosscoders.common.errors import InputError
from crosscoders.text.documents import read_documents
from crosscoders.text.positions import scored_positions
from crosscoders.text.tokens import ROLES, read_template, tokenize_chat

TEMPLATE, RESPONSE = ROLES.index("template"), ROLES.index("assistant")


class Chat(NamedTuple):
    """Token ids of one chat and what each of them belongs to."""

    ids: Int[np.ndarray, " seq"]
    roles: Int[np.ndarray, " seq"]
    scored: Bool[np.ndarray, " seq"]
    """Cached, encoded and patched; the others keep the target's own activation."""


class ChatBatch(NamedTuple):
    """Chats, padded on the right."""

    ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    scored: Bool[Tensor, "rows seq"]
    is_template: Bool[Tensor, "rows seq"]
    place: Int[Tensor, "rows seq"]
    """Place of a response token in its response, counted from 1; 0 for every other token, and for a first token, which
    nothing predicts."""
    documents: Int[Tensor, " rows"]


def read_chats(config: CacheConfig, tokenizer: Any, n_documents: int) -> list[Chat]:
    """The first chats with a response, in the order of documents that `config` makes, tokenised as for its cache.

    Raises:
        InputError: no document has a response, or there is no chat template.
    """
    template = read_template(config.chat_template)
    found: list[Chat] = []
    documents = read_documents(
        config.sources(), shuffle_window=config.shuffle_documents, seed=config.seed, count_tokens=lambda _: 1
    )
    for document in documents:
        if isinstance(document.content, str):
            continue
        if template is None and not tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template, so responses cannot be told. Cache with --chat-template."
            )
        try:
            parts = tokenize_chat(tokenizer, document.content, template)
        except InputError as error:
            raise InputError(f"{document.where}: {error}") from None
        ids, roles = (np.array(part[: config.context_length]) for part in parts)
        if (roles[1:] == RESPONSE).any():
            scored = scored_positions(
                ids, tokenizer.bos_token_id, drop_bos=config.drop_bos, skip_first=config.skip_first
            )
            found.append(Chat(ids, roles, scored))
        if len(found) == n_documents:
            break
    if not found:
        raise InputError(
            f"no document of {', '.join(source.path for source in config.sources())} has a response, a message of the "
            "role assistant within the context length. Name chats with --data."
        )
    return found


def batches(chats: list[Chat], batch_rows: int, pad_id: int) -> list[ChatBatch]:
    """All chats, those of similar length together, so that padding is rare; the longest first, so that memory runs out
    at once or not at all."""
    order = sorted(range(len(chats)), key=lambda i: -len(chats[i].ids))
    groups = [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]
    return [_pad([chats[i] for i in group], group, pad_id) for group in groups]


def response_places(roles: Int[np.ndarray, " seq"]) -> Int[np.ndarray, " seq"]:
    """1, 2, 3, ... along each run of response tokens, 0 elsewhere."""
    is_response = roles == RESPONSE
    number = np.cumsum(is_response)
    before = np.maximum.accumulate(np.where(is_response, 0, number))
    return np.where(is_response, number - before, 0)


def _pad(chats: list[Chat], numbers: list[int], pad_id: int) -> ChatBatch:
    shape = (len(chats), max(len(chat.ids) for chat in chats))
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask, place = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    scored, is_template = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, chat in enumerate(chats):
        n = len(chat.ids)
        ids[row, :n], mask[row, :n], scored[row, :n] = chat.ids, 1, chat.scored
        is_template[row, :n], place[row, :n] = chat.roles == TEMPLATE, response_places(chat.roles)
    place[:, 0] = 0
    arrays = (ids, mask, scored, is_template, place, np.array(numbers))
    return ChatBatch(*(torch.from_numpy(array) for array in arrays))
