"""The change between two language models: the difference of each linear map, or a LoRA's factors, and their task.

Embeddings, norms and biases are not decomposed: they stay as the tuned model has them under every mask, and `kept` says
what KL they cause alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.text.padding import Batch
from diffing.decomposition.evaluation import reference_of
from diffing.decomposition.loop import Problem
from diffing.decomposition.losses.reconstruction import Task, mean_kl
from diffing.decomposition.model import Decomposition
from diffing.decomposition.sites import Delta, find_sites, matrix
from diffing.topk_lora.distil import Setting, logits_at

REFERENCE_BATCHES = 16
"""Batches of the training data that the KL to explain is measured on."""


class LanguageTask:
    """KL of the next-token predictions of the scored tokens; every token that is no padding has importances."""

    distance = staticmethod(mean_kl)

    def outputs(self, model: Any, batch: Batch) -> Float[Tensor, "answers out"]:
        """Return the logits that predict the scored tokens."""
        return logits_at(model, batch)

    def counted(self, batch: Batch) -> Bool[Tensor, "*positions"]:
        """Return which tokens are no padding."""
        return batch.attention_mask.bool()


class Kept(NamedTuple):
    """KL in nats per token, of the tuned model to others."""

    base: float
    """To the base."""
    explainable: float
    """To itself with every mask 0: what the sites can explain."""
    rest: float
    """Of the model with every mask 0 to the base: what embeddings, norms, biases and other maps change alone."""


def deltas_of(base: nn.Module, tuned: nn.Module, patterns: Sequence[str]) -> dict[str, Delta]:
    """Return the change of each site that matches, in the order of the tuned model; a LoRA's in factored form.

    Sites whose weights are the same in both are left out, with a line that counts them.

    Raises:
        InputError: a pattern matches nothing; the models have other maps or shapes; nothing changed.
    """
    names, deltas, unchanged = find_sites(tuned, patterns), {}, 0
    others = dict(base.named_modules())
    for name in names:
        module = tuned.get_submodule(name)
        if hasattr(module, "lora_A"):
            delta = _of_lora(name, module)
        else:
            other = others.get(name)
            before = None if other is None or not hasattr(other, "weight") else matrix(other)
            after = matrix(module)
            if before is None or before.shape != after.shape:
                shape = "is missing" if before is None else f"is {tuple(before.shape)}"
                raise InputError(
                    f"site {name} {shape} in the base and {tuple(after.shape)} in the tuned model. Choose two models "
                    "of one architecture, or other --sites."
                )
            delta = Delta(after - before)
        if bool(delta.inner.any()):
            deltas[name] = delta
        else:
            unchanged += 1
    if not deltas:
        raise InputError(f"none of the {len(names)} sites differs between the models. Choose others with --sites.")
    if unchanged:
        say(f"{unchanged} of {len(names)} sites are the same in both models and are left out")
    return deltas


def _of_lora(name: str, module: Any) -> Delta:
    """Return s B A as orthonormal bases with the singular values between, from the SVD of a rank x rank matrix."""
    if any(module.use_dora.values()):
        raise InputError(f"site {name} has a DoRA, whose change is no product of two factors. Merge it into the model.")
    (adapter,) = module.active_adapters
    a, b = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T * module.scaling[adapter])
    n = max(1, int((s > 1e-6 * s[0].clamp_min(1e-30)).sum()))
    inner, read, write = torch.diag(s[:n]), vh[:n] @ q_a.T, q_b @ u[:, :n]
    return Delta(*(part.detach().float() for part in (inner, read, write)))


def problem_of(setting: Setting, decomposition: Decomposition, seed: int) -> Problem:
    """Return the problem of a fine-tune: batches in an order drawn anew for every pass, KL over the KL to explain."""
    task: Task = LanguageTask()
    shapes = [batch.ids.shape for batch in setting.train]
    reference = reference_of(decomposition, task, setting.train[:REFERENCE_BATCHES])
    if reference < 1e-6:
        raise InputError(
            f"the sites change the predictions by {reference:.1e} nats/token, too little to explain. Choose others."
        )
    positions = tuple(max(shape[axis] for shape in shapes) for axis in (0, 1))
    return Problem(decomposition, task, _batches(setting.train, seed), positions, reference, is_relative=True)


def _batches(batches: list[Batch], seed: int) -> Callable[[int], Batch]:
    def batch_of(step: int) -> Batch:
        epoch, place = divmod(step, len(batches))
        return batches[np.random.default_rng([seed, epoch]).permutation(len(batches))[place]]

    return batch_of


@torch.no_grad()
def kept(setting: Setting, decomposition: Decomposition) -> Kept:
    """Return the three KLs on the held-out batches."""
    totals, n = np.zeros(3), 0
    for batch in setting.held_out:
        tuned, base = logits_at(setting.tuned, batch), logits_at(setting.base, batch)
        with decomposition.masked(decomposition.constant(0, 0)):
            off = logits_at(decomposition.model, batch)
        totals += [len(tuned) * float(mean_kl(*pair)) for pair in ((tuned, base), (tuned, off), (off, base))]
        n += len(tuned)
    return Kept(*(totals / n).tolist())
