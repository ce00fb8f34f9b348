"""What is lost in a model's predictions: `log_probs`, `ce`, `kl`. Definitions in docs/math.md, section "Metrics"."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_probs(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
    """Return log softmax in float32, whatever type the model runs in; what `ce` and `kl` take."""
    return torch.log_softmax(logits.float(), dim=-1)


def ce(log_q: Float[Tensor, "tokens vocab"], token_ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Return the cross-entropy of each token under the prediction q made for it: -log q(token), nats."""
    return -log_q.gather(1, token_ids[:, None].long()).squeeze(1)


def kl(
    log_p: Float[Tensor, "tokens vocab"],
    log_q: Float[Tensor, "tokens vocab"],
    p: Float[Tensor, "tokens vocab"] | None = None,
) -> Float[Tensor, " tokens"]:
    """Return KL(p || q) = sum_v p_v (log p_v - log q_v) of each token, nats; p is the model as it is, q the changed
    one.

    p: exp(log_p), where it is known already.
    """
    return ((log_p.exp() if p is None else p) * (log_p - log_q)).sum(dim=1)
