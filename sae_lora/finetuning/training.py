r"""Short training of an SAE on reconstruction, from given weights.

    loss = mean_n ||x_n - x_hat_n||^2 / V + w P / P_0,    P = mean_n sum_j f_nj ||d_j||
    w <- max(0, w + rate (L0 / L0_0 - 1)) after every step, from 0

V is the variance of x, L0_0 and P_0 are those of the SAE as given, on the same model, before the first step: with w
the SAE stays as sparse as it was. A TopK SAE is so by itself, and has w = 0. Thresholds stay as they are. Adam moves no
latent that never fires, so that dead latents keep their numbers too.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.progress import Progress
from crosscoders.dictionary.metrics import Evaluation, ReconstructionSums
from crosscoders.models import hooks
from sae_lora.dictionaries.frozen import FrozenDictionary, SaeLens
from sae_lora.finetuning.settings import FinetuneSaeSettings
from sae_lora.fitting.inputs import Plan

_RATE = 0.01
_DECAY = 0.2


class Tuned(NamedTuple):
    """What a fine-tune did, on tokens that it did not train on."""

    before: Evaluation
    after: Evaluation
    n_tokens: int
    """Trained on."""


def activation_blocks(
    plan: Plan, model: nn.Module, settings: FinetuneSaeSettings, device: torch.device
) -> Iterator[Float[Tensor, "tokens d_model"]]:
    """Yield the activations of scored tokens in blocks of about buffer_tokens, in the order of the documents."""
    hook_point = plan.infos[0].hook_point
    held: list[Tensor] = []
    for batch in plan.batches(settings.batch_rows, device):
        x = hooks.run_to(model, [hook_point], batch.ids, batch.attention_mask)[hook_point]
        held.append(x[batch.scored].clone().float())
        if sum(map(len, held)) >= settings.buffer_tokens:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def require_a_step(n_tokens: int, batch_tokens: int) -> None:
    """Raise InputError where the tokens that are not held out do not fill one step."""
    if n_tokens - n_tokens // 8 < batch_tokens:
        raise InputError(
            f"{n_tokens:,} tokens are less than one step of {batch_tokens}, an eighth of them held out. Raise "
            "n_tokens, or lower batch_tokens."
        )


def finetune_sae(sae: SaeLens, blocks: Iterator[Tensor], n_tokens: int, settings: FinetuneSaeSettings) -> Tuned:
    """Train an SAE in place on blocks of activations; the first eighth of the first block is only evaluated.

    Raises:
        CorruptData: the loss is not finite.
    """
    block, size = next(blocks), settings.batch_tokens
    n_held = max(1, min(len(block) // 8, 8192))
    held, block = block[:n_held], block[n_held:]
    before = quality(sae, held)
    trainer = _Trainer(sae, held, max(1, (n_tokens - n_held) // size), settings)
    generator = torch.Generator().manual_seed(settings.seed)
    progress = Progress("finetune-sae", total=n_tokens, start=n_held, unit="tok")
    n_trained = 0
    while True:
        order = torch.randperm(len(block), generator=generator).to(block.device)
        n_used = len(order) // size * size
        for start in range(0, n_used, size):
            trainer.step(block[order[start : start + size]])
            progress.update(size)
        n_trained += n_used
        following = next(blocks, None)
        if following is None:
            break
        block = torch.cat([block[order[n_used:]], following])
    progress.close()
    return Tuned(before, quality(sae.requires_grad_(False), held), n_trained)


class _Trainer:
    """Optimiser, targets of the loss, and the weight of sparsity."""

    def __init__(self, sae: SaeLens, held: Tensor, n_steps: int, settings: FinetuneSaeSettings) -> None:
        self.sae, self.n_steps, self.lr, self.done = sae, n_steps, settings.lr, 0
        with torch.no_grad():
            f = sae.encode(held)
            self.l0, self.penalty = float((f > 0).float().sum(dim=1).mean()), float(self._penalty(f))
            self.variance = float((held - held.mean(dim=0)).square().sum(dim=1).mean())
        self.is_sparse_by_itself = sae.info.settings.get("architecture") == "topk"
        self.weight = 0.0
        self.trained = [w for name, w in sae.named_parameters() if "threshold" not in name]
        for weight in self.trained:
            weight.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.trained, lr=settings.lr)

    def _penalty(self, f: Float[Tensor, "tokens dict_size"]) -> Float[Tensor, ""]:
        return (f @ self.sae.sae.W_dec.norm(dim=1)).mean()

    def step(self, x: Float[Tensor, "tokens d_model"]) -> None:
        """Take one step."""
        n_left = self.n_steps - self.done
        self.optimizer.param_groups[0]["lr"] = self.lr * max(0.0, min(1.0, n_left / max(1, _DECAY * self.n_steps)))
        f, x_hat = self.sae.reconstruct(x)
        loss = (x - x_hat).square().sum(dim=1).mean() / self.variance
        if not self.is_sparse_by_itself:
            loss = loss + self.weight * self._penalty(f) / max(self.penalty, 1e-12)
            l0 = float((f > 0).float().sum(dim=1).mean())
            self.weight = max(0.0, self.weight + _RATE * (l0 / max(self.l0, 1e-12) - 1))
        if not torch.isfinite(loss):
            raise CorruptData(f"the loss is {loss.item()} at step {self.done}. Lower lr, or check the SAE.")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.done += 1


@torch.no_grad()
def quality(dictionary: FrozenDictionary, x: Float[Tensor, "tokens d_model"]) -> Evaluation:
    """Return FVE and L0 of a dictionary on activations."""
    sums = ReconstructionSums(1, x.shape[1], dictionary.info.dict_size)
    for part in x.split(1024):
        f, x_hat = dictionary.reconstruct(part)
        sums.add(part[:, None], x_hat[:, None], (f > 0).sum(dim=0))
    return sums.result()
