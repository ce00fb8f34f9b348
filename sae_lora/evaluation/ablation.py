r"""Whether latents are still the same after a fit: how often they fire, and what the model does without them.

`rate_rows` compares firing rates of all latents on the same tokens. `effects` ablates a seeded sample of latents, each
alone, in the sequences where it fires:

    e_j = sum KL(q || q without j) / firing tokens of j     q: the spliced model, adapter off (before) or on (after)

A model that learns to route around the dictionary reacts less. As it may react less to everything, a push of the same
size at the same tokens, in a fixed random direction for each latent, is measured beside it (`random`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.common.results import row
from crosscoders.common.statistics import bootstrap_interval, resample, wilson
from crosscoders.models import predictions
from crosscoders.models.resume import ToLogits, final_states, head_alone
from crosscoders.text.padding import Batch
from sae_lora.dictionaries.frozen import FrozenDictionary
from sae_lora.fitting.correctors import Fitted
from sae_lora.lora.adapter import lora_off
from sae_lora.splicing import kept_positions, splice

MIN_TOKENS = 10
"""Latents that fire on fewer tokens have no rate worth comparing, and are not ablated."""
MAX_SEQUENCES = 64
"""Sequences in which a latent is ablated: the first ones where it fires."""
PERTURBATIONS = ("latent", "random")


class Effects(NamedTuple):
    """What perturbing each of the sampled latents of one dictionary does."""

    latents: list[int]
    kl: Float[np.ndarray, "perturbations when latents"]
    """Sums over predictions, nats; perturbations as `PERTURBATIONS`, when: before, after."""
    n_firing: Int[np.ndarray, " latents"]
    """Tokens on which each fires before, in the sequences in which it is ablated."""


class Ablating(FrozenDictionary):
    """A dictionary without one latent, which may be another one for each token; or with a push of the same size."""

    def __init__(self, source: FrozenDictionary) -> None:
        super().__init__(source.info)
        self.source = source
        self.which: Int[Tensor, " tokens"] = torch.zeros(0, dtype=torch.int64)
        self.directions: Float[Tensor, "tokens d_model"] | None = None
        """Unit vectors to push along in place of the ablation."""

    def reconstruct(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens dict_size"], Float[Tensor, "tokens d_model"]]:
        latents = self.source.encode(x)
        without = self.source.decode(latents.scatter(1, self.which[:, None], 0.0))
        if self.directions is None:
            return latents, without
        whole = self.source.decode(latents)
        return latents, whole - (whole - without).norm(dim=1, keepdim=True) * self.directions.to(whole.dtype)


def choose_latents(n_active: Int[Tensor, " dict_size"], n: int, seed: int) -> list[int]:
    """Return a sample of the latents that fire on enough tokens, all of them where there are no more than n."""
    able = np.flatnonzero(n_active.numpy() >= MIN_TOKENS)
    return sorted(np.random.default_rng(seed).choice(able, min(n, len(able)), replace=False).tolist())


@torch.no_grad()
def effects(
    fitted: Fitted,
    dictionaries: Sequence[FrozenDictionary],
    hook_point: str,
    latents: list[int],
    batches: Iterator[Batch],
    keep_ids: Sequence[int],
    seed: int = 0,
) -> Effects:
    """Measure what the model loses without each of these latents of the dictionary at a hook point."""
    device = next(fitted.model.parameters()).device
    chosen = torch.tensor(latents, device=device)
    d_model = next(d.info.d_model for d in dictionaries if d.hook_point == hook_point)
    drawn = torch.randn(len(latents), d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = (drawn / drawn.norm(dim=1, keepdim=True)).float().to(device)
    runs = [_runner(fitted, put, hook_point, keep_ids) for put in (dictionaries, None)]
    kl = np.zeros((len(PERTURBATIONS), 2, len(latents)))
    n_firing, n_sequences = (np.zeros(len(latents), dtype=np.int64) for _ in range(2))
    for batch in batches:
        used = batch.scored.clone()
        used[:, 0] = False
        firing = _firing(fitted, dictionaries, hook_point, chosen, batch, keep_ids)
        pairs = [
            (r, j)
            for r, j in (firing > 0).nonzero().tolist()
            if n_sequences[j] + int((firing[:r, j] > 0).sum()) < MAX_SEQUENCES
        ]
        whole = [run(batch, None, None) for run in runs] if pairs else []
        for start in range(0, len(pairs), len(batch.ids)):
            r, j = torch.tensor(pairs[start : start + len(batch.ids)], device=device).T
            part = batch.take(r)
            for kind, pushed in enumerate((None, directions[j])):
                for when, run in enumerate(runs):
                    changed = run(part, chosen[j], pushed)
                    with head_alone(fitted.model) as to_logits:
                        sums = _kl_of_rows(to_logits, whole[when][r], changed, used[r])
                    np.add.at(kl[kind, when], j.cpu().numpy(), sums)
        for r, j in pairs:
            n_firing[j] += int(firing[r, j])
            n_sequences[j] += 1
    return Effects(latents, kl, n_firing)


def _runner(
    fitted: Fitted, put: Sequence[FrozenDictionary] | None, hook_point: str, keep_ids: Sequence[int]
) -> Callable[[Batch, Tensor | None, Tensor | None], Tensor]:
    """Return the final hidden states before (these dictionaries, LoRA off) or after (None: those of the fit), one
    latent less in each row."""
    spliced = fitted.dictionaries if put is None else list(put)
    changed = [Ablating(d) if d.hook_point == hook_point else d for d in spliced]
    ablating = next(d for d in changed if isinstance(d, Ablating))

    def run(batch: Batch, which: Tensor | None, directions: Tensor | None) -> Tensor:
        width = batch.ids.shape[1]
        if which is not None:
            ablating.which = which.repeat_interleave(width)
            ablating.directions = None if directions is None else directions.repeat_interleave(width, dim=0)
        with (
            lora_off(fitted.model) if put is not None else contextlib.nullcontext(),
            splice(fitted.model, spliced if which is None else changed, keep_ids=keep_ids),
        ):
            return final_states(fitted.model, batch)

    return run


def _firing(
    fitted: Fitted,
    dictionaries: Sequence[FrozenDictionary],
    hook_point: str,
    chosen: Int[Tensor, " latents"],
    batch: Batch,
    keep_ids: Sequence[int],
) -> Int[Tensor, "rows latents"]:
    """Return the number of tokens of each sequence on which each latent fires, adapter off."""
    firing: list[Tensor] = []

    def keep(dictionary: FrozenDictionary, _x: Tensor, latents: Tensor, _x_hat: Tensor) -> None:
        if dictionary.hook_point == hook_point:
            firing.append(latents[:, chosen] != 0)

    with lora_off(fitted.model), splice(fitted.model, dictionaries, keep_ids=keep_ids, observe=keep):
        final_states(fitted.model, batch)
    is_kept = kept_positions(batch.ids, batch.attention_mask, keep_ids)
    row_of = torch.arange(len(is_kept), device=is_kept.device)[:, None].expand_as(is_kept)[~is_kept]
    counts = torch.zeros(len(is_kept), len(chosen), dtype=torch.int64, device=is_kept.device)
    return counts.index_add(0, row_of, firing[0].long()).cpu()


def _kl_of_rows(
    to_logits: ToLogits,
    p: Float[Tensor, "rows seq d_model"],
    q: Float[Tensor, "rows seq d_model"],
    used: Bool[Tensor, "rows seq"],
) -> Float[np.ndarray, " rows"]:
    sums = np.zeros(len(used))
    for r in range(len(used)):
        log_p, log_q = (predictions.log_probs(to_logits(final[r, :-1][used[r, 1:]])) for final in (p, q))
        sums[r] = float(predictions.kl(log_p, log_q).double().sum())
    return sums


def rate_rows(
    hook_point: str, before: Int[Tensor, " dict_size"], after: Int[Tensor, " dict_size"], seed: int = 0
) -> list[dict[str, Any]]:
    """Return rows eval.rates.<hook point>.correlation and .changed, from the tokens on which each latent fired. A
    correlation without variance is left out."""
    counts = np.stack([before.numpy(), after.numpy()]).astype(float)
    rows = []
    alive = counts[:, counts.max(axis=0) > 0]
    if alive.shape[1] > 1 and alive.std(axis=1).all():
        values = _correlations(alive, resample(alive.shape[1], seed))
        limits = bootstrap_interval(values)
        rows.append(
            row(f"eval.rates.{hook_point}.correlation", float(values[0]), "correlation", alive.shape[1], *limits)
        )
    often = counts[:, counts.max(axis=0) >= MIN_TOKENS]
    if often.shape[1]:
        n_changed = int((often.max(axis=0) > 2 * often.min(axis=0)).sum())
        share = n_changed / often.shape[1]
        limits = wilson(n_changed, often.shape[1])
        rows.append(row(f"eval.rates.{hook_point}.changed", share, "fraction", often.shape[1], *limits))
    return rows


def _correlations(
    pair: Float[np.ndarray, "2 n"], weights: Float[np.ndarray, "resamples n"]
) -> Float[np.ndarray, " varying"]:
    """Return correlation of two counts under each row of weights; rows without variance are left out."""
    x, y = pair - pair.mean(axis=1, keepdims=True)
    mean_x, mean_y, xx, yy, xy = (weights @ np.stack([x, y, x * x, y * y, x * y], axis=1)).T / len(x)
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    varies = (var_x > 1e-12 * xx) & (var_y > 1e-12 * yy)  # equal values leave rounding of their square
    return np.clip(covariance[varies] / np.sqrt(var_x[varies] * var_y[varies]), -1, 1)


def effect_rows(hook_point: str, measured: Effects, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows eval.effects.<hook point>.{before,after,ratio,halved} and .random.{before,after,ratio}; means over
    latents of nats per firing token, ratios of those means, 95% bootstrap intervals over latents."""
    able = measured.n_firing > 0
    n = int(able.sum())
    if not n:
        return []
    weights = resample(n, seed) / n
    rows = []
    for kind, name in enumerate(PERTURBATIONS):
        place = f"eval.effects.{hook_point}." + ("" if name == "latent" else f"{name}.")
        each = measured.kl[kind][:, able] / measured.n_firing[able]
        before, after = (weights @ values for values in each)
        columns = [("before", before, "nats/firing"), ("after", after, "nats/firing")]
        if (before > 0).all():
            columns.append(("ratio", after / before, "ratio"))
        for key, values, unit in columns:
            rows.append(row(place + key, float(values[0]), unit, n, *bootstrap_interval(values)))
        if name == "latent":
            n_halved = int((each[1] < each[0] / 2).sum())
            rows.append(row(place + "halved", n_halved / n, "fraction", n, *wilson(n_halved, n)))
    return rows
