r"""Train a TopK SAE end to end: by the KL of the spliced model to the model as it is, through the frozen model.

    loss = sum_n KL(p_n || q_n) / N + a auxiliary
    p: no splice; q: the SAE in place of x; N positions that are not padding

The auxiliary term lets dead latents reconstruct what x_hat leaves of x (`dictionary.losses.auxiliary_loss`) and moves
no others; without it most latents of a TopK SAE die. What LoRA around an SAE that was trained by reconstruction is
compared with. Source: Braun et al. 2024, arXiv 2405.12241, the loss "e2e"; differs: TopK with an auxiliary term (Gao et
al. 2024, arXiv 2406.04093) in place of an L1 term, as Chen, Engels, Tegmark 2025, arXiv 2501.19406, have TopK.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosscoders.common.errors import CorruptData, InputError
from crosscoders.dictionary.losses import auxiliary_loss
from crosscoders.models import resume
from crosscoders.text.padding import Batch
from sae_lora.dictionaries.frozen import DictionaryInfo, SaeLens
from sae_lora.fitting import objective

AUX_COEFFICIENT = 1 / 32
DEAD_AFTER_TOKENS = 100_000


class Step(NamedTuple):
    """One optimiser step."""

    kl: float
    """Nats per token, before the step."""
    n_tokens: int
    """Positions that are not padding."""


def trainable(sae: Any, hook_point: str) -> SaeLens:
    """Return a training SAE of SAELens as a dictionary whose weights take gradients.

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
    chunk_tokens: int = 64,
    aux_coefficient: float = AUX_COEFFICIENT,
    dead_after_tokens: int = DEAD_AFTER_TOKENS,
) -> Iterator[Step]:
    """Train the dictionary in place, one step for each batch, and yield after each.

    model: frozen. lr_at: rate of Adam at a step. A latent is dead when no replaced token activated it among the last
    dead_after_tokens. What lies below the hook point runs once for both models.

    Raises:
        InputError: as `resume.require_head`.
        CorruptData: the KL is not finite.
    """
    weights = list(dictionary.parameters())
    optimizer = torch.optim.Adam(weights, lr=lr_at(0), fused=True)
    prefix, since_fired = None, torch.zeros(dictionary.info.dict_size, dtype=torch.int64, device=weights[0].device)
    for number, batch in enumerate(batches):
        if not number:
            resume.require_head(model, batch)
            prefix = resume.find_prefix(model, dictionary.hook_point, batch)
        seen: list[Tensor] = []
        total = objective.batch_kl(
            model,
            [dictionary],
            batch,
            keep_ids,
            chunk_tokens=chunk_tokens,
            prefix=prefix,
            observe=lambda _, *tensors, seen=seen: seen.extend(tensors),
        )
        if not torch.isfinite(total):
            raise CorruptData(f"the KL is {total.item()} at step {number}. Lower the rate.")
        x, latents, x_hat = seen
        loss, dead = objective.scaled(total, batch, "mean"), since_fired >= dead_after_tokens
        if aux_coefficient and bool(dead.any()):
            loss = loss + aux_coefficient * auxiliary(dictionary, x, x_hat, dead)
        since_fired = torch.where((latents > 0).any(dim=0), 0, since_fired + len(x))
        optimizer.param_groups[0]["lr"] = lr_at(number)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip_norm)
        optimizer.step()
        n_tokens = int(batch.attention_mask.sum())
        yield Step(float(total.detach()) / n_tokens, n_tokens)


def auxiliary(
    dictionary: SaeLens,
    x: Float[Tensor, "tokens d_model"],
    x_hat: Float[Tensor, "tokens d_model"],
    dead: Bool[Tensor, " dict_size"],
) -> Float[Tensor, ""]:
    """Return how much of err = x - x_hat, a constant, the d_model / 2 dead latents of largest pre-activation leave."""
    sae, err = dictionary.sae, (x - x_hat).detach()
    pre = sae.process_sae_in(x) @ sae.W_enc[:, dead] + sae.b_enc[dead]
    if sae.cfg.rescale_acts_by_decoder_norm:
        pre = pre * sae.W_dec[dead].norm(dim=1)
    chosen = pre.topk(min(x.shape[1] // 2, pre.shape[1]), dim=1)
    largest = torch.zeros_like(pre).scatter(1, chosen.indices, chosen.values.relu())
    latents = pre.new_zeros(len(x), len(dead)).index_copy(1, dead.nonzero().squeeze(1), largest)
    err_hat = dictionary.decode(latents) - dictionary.decode(torch.zeros_like(latents[:1]))  # without bias
    return auxiliary_loss((err - err_hat).square().sum(dim=1, keepdim=True), err[:, None])
