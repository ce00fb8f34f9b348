r"""Train a TopK SAE end to end: by the KL of the spliced model to the model as it is, through the frozen model.

    loss = sum_n KL(p_n || q_n) / N     p: no splice; q: the SAE in place of x; N positions that are not padding

What LoRA around an SAE that was trained by reconstruction is compared with. Source: Braun et al. 2024, arXiv
2405.12241, the loss "e2e"; differs: TopK in place of an L1 term, as in Chen, Engels, Tegmark 2025, arXiv 2501.19406.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from crosscoders.errors import CorruptData, InputError
from sae_lora import objective
from sae_lora.dictionary import DictionaryInfo, SaeLens
from sae_lora.inputs import Batch


class Step(NamedTuple):
    """One optimiser step."""

    kl: float
    """Nats per token, before the step."""
    n_tokens: int
    """Positions that are not padding."""


def trainable(sae: Any, hook_point: str) -> SaeLens:
    """A training SAE of SAELens as a dictionary whose weights take gradients.

    Raises:
        InputError: another architecture than topk, whose sparsity would need a term of its own.
    """
    architecture = sae.cfg.architecture()
    if architecture != "topk":
        raise InputError(f"an SAE of architecture {architecture!r} is not trained end to end; only 'topk' is.")
    info = DictionaryInfo("sae-lens", "", hook_point, sae.cfg.d_in, sae.cfg.d_sae, {"architecture": architecture})
    return SaeLens(info, sae).requires_grad_(True)


def train_end_to_end(
    dictionary: SaeLens,
    model: nn.Module,
    batches: Iterable[Batch],
    keep_ids: list[int],
    *,
    lr_at: Callable[[int], float],
    clip_norm: float = 1.0,
    chunk_tokens: int = 512,
) -> Iterator[Step]:
    """Train the dictionary in place, one step for each batch, and yield after each.

    model: frozen. lr_at: rate of Adam at a step. What lies below the hook point runs once for both models.

    Raises:
        CorruptData: the KL is not finite.
    """
    weights = list(dictionary.parameters())
    optimizer = torch.optim.Adam(weights, lr=lr_at(0))
    prefix = None
    for number, batch in enumerate(batches):
        if not number:
            prefix = objective.find_prefix(model, dictionary.hook_point, batch)
        total = objective.batch_kl(model, [dictionary], batch, keep_ids, chunk_tokens=chunk_tokens, prefix=prefix)
        if not torch.isfinite(total):
            raise CorruptData(f"the KL is {total.item()} at step {number}. Lower the rate.")
        optimizer.param_groups[0]["lr"] = lr_at(number)
        optimizer.zero_grad()
        objective.scaled(total, batch, "mean").backward()
        nn.utils.clip_grad_norm_(weights, clip_norm)
        optimizer.step()
        n_tokens = int(batch.attention_mask.sum())
        yield Step(float(total.detach()) / n_tokens, n_tokens)
