r"""DPO with a TopKLoRA: the reference is the same model with the adapter off, so it costs no second model.

    loss = -log sigmoid(beta * margin)
    margin = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]

log p sums over the response tokens. A fresh adapter has margin 0, so the first loss is ln 2.
Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from crosscoders.common.errors import InputError
from crosscoders.models.predictions import ce, log_probs
from crosscoders.text.padding import pad, padding_id
from crosscoders.text.tokens import tokenize_chat, tokenize_prompt
from diffing.finetuning import Schedule, finetune
from sae_lora.lora.topk import TopKLoRA

PUBLISHED = {"beta": 0.2, "lr": 2e-5, "warmup_share": 0.03}
"""Settings of the published adapters."""


class Replies(NamedTuple):
    """Prompts with replies, padded on the right."""

    ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    is_reply: Bool[Tensor, "rows seq"]


class Preferences(NamedTuple):
    """Two replies to each prompt."""

    chosen: Replies
    rejected: Replies


def tokenize_preferences(
    rows: Sequence[dict[str, Any]], tokenizer: Any, template: str | None = None, *, context_length: int = 512
) -> Preferences:
    """Return preferences as `trl` and the hub hold them: `prompt` (a text, or messages), `chosen` and `rejected` (a
    text, or a list of one message). A reply is what follows the prompt's tokens, with the end of its turn.

    Raises:
        InputError: a row lacks one of them, or is longer than `context_length` tokens.
    """
    halves: list[list[tuple[list[int], int]]] = [[], []]
    for number, row in enumerate(rows):
        if missing := [key for key in ("prompt", "chosen", "rejected") if not row.get(key)]:
            raise InputError(f"preference {number} has no {missing[0]!r}. A row is {{prompt, chosen, rejected}}.")
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        start = tokenize_prompt(tokenizer, messages, template)
        for half, reply in zip(halves, (row["chosen"], row["rejected"]), strict=True):
            said = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply[0]
            ids, _ = tokenize_chat(tokenizer, [*messages, said], template)
            if len(ids) > context_length:
                raise InputError(f"preference {number} has {len(ids)} tokens; raise context_length, or leave it out.")
            half.append((ids, len(start)))
    return Preferences(*(_padded(half, padding_id(tokenizer)) for half in halves))


def _padded(half: list[tuple[list[int], int]], pad_id: int) -> Replies:
    return Replies(
        pad([np.array(ids) for ids, _ in half], pad_id, torch.int64),
        pad([np.ones(len(ids), dtype=np.int64) for ids, _ in half], 0, torch.int64),
        pad([np.arange(len(ids)) >= start for ids, start in half], 0, torch.bool),
    )


def reply_log_probs(model: Any, replies: Replies) -> Float[Tensor, " rows"]:
    """Return log p of each reply, summed over its tokens, nats."""
    logits = model(input_ids=replies.ids, attention_mask=replies.attention_mask, use_cache=False).logits[:, :-1]
    of_reply = replies.is_reply[:, 1:]
    losses = ce(log_probs(logits[of_reply]), replies.ids[:, 1:][of_reply])
    rows = of_reply.nonzero()[:, 0]
    return torch.zeros(len(replies.ids), device=losses.device).index_add(0, rows, -losses)


def preference_margins(model: Any, adapter: TopKLoRA, batch: Preferences) -> Float[Tensor, " rows"]:
    """Return the margin of each prompt, nats."""
    with torch.no_grad(), adapter.disabled():
        reference = reply_log_probs(model, batch.chosen) - reply_log_probs(model, batch.rejected)
    return reply_log_probs(model, batch.chosen) - reply_log_probs(model, batch.rejected) - reference


def dpo_loss(model: Any, adapter: TopKLoRA, batch: Preferences, beta: float) -> Float[Tensor, ""]:
    """Return the loss of the module's docstring."""
    return -logsigmoid(beta * preference_margins(model, adapter, batch)).mean()


def train_preferences(
    model: Any,
    adapter: TopKLoRA,
    batches: Iterator[Preferences],
    schedule: Schedule,
    *,
    beta: float = PUBLISHED["beta"],
) -> None:
    """Train an attached adapter on preferences; k falls as its settings say.

    Raises:
        CorruptData: the loss is not finite.
    """

    def counted() -> Iterator[Preferences]:
        for step, batch in enumerate(batches):
            adapter.set_progress(step / schedule.steps)
            yield batch

    adapter.train()
    finetune(
        model, counted(), lambda batch: dpo_loss(model, adapter, batch, beta),
        torch.optim.Adam(adapter.parameters(), lr=schedule.lr), schedule, tokens_per_step=1, name="dpo",
    )  # fmt: skip
    adapter.set_progress(1.0)
    adapter.eval()
