"""Prompts whose replies are watched: the adapted base's own greedy reply, and whether it is still given when directions
are changed.

A reply counts by its tokens under teacher forcing: if each of the first n is the largest logit given those before it,
greedy decoding gives exactly these n, so one forward pass says what generation would.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.text.documents import read_source
from crosscoders.text.padding import pad
from crosscoders.text.settings import DataSource
from crosscoders.text.tokens import tokenize_prompt

REPLY_TOKENS = 6
"""Tokens of a reply that count as the whole of it."""
DECISION_TOKENS = 2
"""The first of them: whether the behaviour was chosen at all."""


class Prompts(NamedTuple):
    """Prompts with their replies, padded on the right."""

    ids: Int[Tensor, "prompts seq"]
    attention_mask: Int[Tensor, "prompts seq"]
    starts: Int[Tensor, " prompts"]
    """Position of the first token of the reply."""
    labels: list[str]

    def take(self, chosen: Sequence[int] | Int[np.ndarray, " chosen"]) -> "Prompts":
        """Return some of the prompts."""
        rows = torch.as_tensor(np.asarray(chosen), dtype=torch.int64)
        return Prompts(
            self.ids[rows], self.attention_mask[rows], self.starts[rows], [self.labels[i] for i in rows.tolist()]
        )

    def of(self, label: str) -> Int[np.ndarray, " prompts"]:
        """Return the numbers of the prompts of a label."""
        return np.flatnonzero(np.array(self.labels) == label)


def read_prompts(sources: list[DataSource], tokenizer: Any, *, per_label: int) -> tuple[list[list[int]], list[str]]:
    """Return token ids of chats up to their first user message, and their labels (the `group` of a row), at most
    `per_label` different ones of each label, in the order of the files.

    Raises:
        InputError: there is no chat.
    """
    ids: list[list[int]] = []
    labels: list[str] = []
    seen: set[str] = set()
    for source in sources:
        for document in read_source(source):
            if document.refused is not None or isinstance(document.content, str):
                continue
            roles = [message["role"] for message in document.content]
            if "user" not in roles:
                continue
            asked = document.content[: roles.index("user") + 1]
            question, label = json.dumps(asked), document.group
            if question in seen or labels.count(label) >= per_label:
                continue
            seen.add(question)
            ids.append(tokenize_prompt(tokenizer, asked))
            labels.append(label)
    if not ids:
        raise InputError("no chat was found in the data. Name files whose rows have `messages`, and a `group`.")
    return ids, labels


@torch.inference_mode()
def with_replies(model: Any, prompts: list[list[int]], labels: list[str], *, batch: int = 64) -> Prompts:
    """Add the model's greedy replies of REPLY_TOKENS tokens; token by token over the whole rows, without a cache."""
    device = next(model.parameters()).device
    ids = pad([np.array([*row, *[0] * REPLY_TOKENS]) for row in prompts], 0, torch.int64).to(device)
    mask = pad([np.ones(len(row) + REPLY_TOKENS, dtype=np.int64) for row in prompts], 0, torch.int64).to(device)
    starts = torch.tensor([len(row) for row in prompts], device=device)
    rows = torch.arange(len(ids), device=device)
    for step in range(REPLY_TOKENS):
        chosen = [
            model(input_ids=ids[part], attention_mask=mask[part], use_cache=False).logits[
                torch.arange(len(part), device=device), starts[part] + step - 1
            ].argmax(dim=-1)
            for part in rows.split(batch)
        ]  # fmt: skip
        ids[rows, starts + step] = torch.cat(chosen)
    return Prompts(ids, mask, starts, labels)


def reply_logits(model: Any, prompts: Prompts) -> Float[Tensor, "prompts tokens vocab"]:
    """Return the logits that predict each token of the replies."""
    logits = model(input_ids=prompts.ids, attention_mask=prompts.attention_mask, use_cache=False).logits
    at = prompts.starts[:, None] - 1 + torch.arange(REPLY_TOKENS, device=logits.device)
    return logits[torch.arange(len(at), device=logits.device)[:, None], at]


def reply_tokens(prompts: Prompts) -> Int[Tensor, "prompts tokens"]:
    """Return the tokens of the replies."""
    at = prompts.starts[:, None] + torch.arange(REPLY_TOKENS, device=prompts.ids.device)
    return prompts.ids.gather(1, at)


@torch.inference_mode()
def given(model: Any, prompts: Prompts, *, batch: int = 64) -> Bool[np.ndarray, "prompts tokens"]:
    """Return which tokens of each reply greedy decoding still gives, with all those before them."""
    parts = [prompts.take(part) for part in np.array_split(np.arange(len(prompts.ids)), -(-len(prompts.ids) // batch))]
    hits = torch.cat([reply_logits(model, part).argmax(dim=-1) == reply_tokens(part) for part in parts])
    return hits.cummin(dim=1).values.cpu().numpy()


def margins(logits: Float[Tensor, "prompts tokens vocab"], tokens: Int[Tensor, "prompts tokens"]) -> Tensor:
    """Return the log odds of each reply token, log p / (1 - p) = z_y - logsumexp of the others, (prompts, tokens).

    They keep a gradient where the reply is certain: log p does not, so a selector by log p finds nothing there.
    """
    own = logits.gather(2, tokens[..., None]).squeeze(2)
    others = logits.scatter(2, tokens[..., None], -torch.inf)
    return own - others.logsumexp(dim=2)
