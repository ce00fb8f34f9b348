r"""DPO with a TopKLoRA: the reference is the same model with the adapter off, so it costs no second model.

    loss = -log sigmoid(beta * margin)
    margin = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]

log p sums over the response tokens. A fresh adapter has margin 0, so the first loss is ln 2.
Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from crosscoders.models.predictions import ce, log_probs
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
