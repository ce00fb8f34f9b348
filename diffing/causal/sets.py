r"""What is exchanged between two models at a hook point, and how sets of latents are chosen for it.

With source s, target t, latents f_j of the crosscoder, decoders D_j^m in the units of x (d_j^m / input_scale_m),
reconstruction x_hat_m, err_m = x_m - x_hat_m, and B_m what is decoded when no latent is active, on every scored token:

    none                  x_s
    latents S             x_s + sum_{j in S} f_j (D_j^t - D_j^s)
    all                   x_s + x_hat_t - x_hat_s              = every latent and the bias
    bias                  x_s + B_t - B_s
    error                 x_s + err_t - err_s
    template              as `all` on tokens of the chat template, x_s elsewhere
    reconstruction        x_hat_t                              the splice of the target's own reconstruction
    cross_reconstruction  x_hat_s                              the splice of the other model's

`all` and `error` together give x_t exactly. Reading order: `Exchange` builds the activations, `orders` ranks latents,
`choose_sets` names the sets of one direction.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.dictionary import selection, sparse
from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.latents.table import require_latents
from diffing.latents.verdict import alive_latents

Kind = Literal["none", "latents", "all", "bias", "error", "template", "reconstruction", "cross_reconstruction"]
WHOLE: tuple[Kind, ...] = ("none", "all", "error", "bias", "template", "reconstruction", "cross_reconstruction")
BASELINES = ("norm", "difference", "cosine", "random")
"""What sets by Latent Scaling are compared with."""
_CHUNK = 2048


class PatchSet(NamedTuple):
    """One activation to try."""

    name: str
    """Its part of a row's name."""
    kind: Kind
    latents: tuple[int, ...] = ()
    """The set S of kind `latents`."""


class Parts(NamedTuple):
    """The scored tokens of one batch, taken apart by the crosscoder; units of x."""

    x: Float[Tensor, "tokens n_models d_model"]
    x_hat: Float[Tensor, "tokens n_models d_model"]
    entries: list[selection.Active]
    """Active latents, in chunks of tokens."""
    is_template: Bool[Tensor, " tokens"]


@runtime_checkable
class Exchanger(Protocol):
    """Takes the activations of two models apart, and puts patched ones together."""

    def take_apart(self, x: Float[Tensor, "tokens n_models d_model"], is_template: Bool[Tensor, " tokens"]) -> Any: ...

    def patched(self, parts: Any, patch: PatchSet, target: int) -> Float[Tensor, "tokens d_model"]: ...


class Exchange:
    """Builds patched activations of a crosscoder of two models.

    Raises:
        InputError: the crosscoder has another number of models.
    """

    def __init__(self, crosscoder: Crosscoder) -> None:
        if crosscoder.config.n_models != 2:
            raise InputError(f"patching needs a crosscoder of two models; this one has {crosscoder.config.n_models}.")
        self.crosscoder = crosscoder
        folded = crosscoder.fold()  # its decoder is in the units of x, with each model's own scale taken out
        self.difference = (folded.W_dec[:, 1] - folded.W_dec[:, 0]).detach()
        self.bias_difference = (folded.b_dec[1] - folded.b_dec[0]).detach()
        self.dict_size = crosscoder.config.dict_size

    @torch.no_grad()
    def take_apart(self, x: Float[Tensor, "tokens n_models d_model"], is_template: Bool[Tensor, " tokens"]) -> Parts:
        """Encode and reconstruct, with the inference gate.

        Raises:
            InputError: the width is not that of the crosscoder.
        """
        crosscoder, entries, x_hat = self.crosscoder, [], []
        if x.shape[1:] != crosscoder.b_dec.shape:
            raise InputError(
                f"the models have activations of width {x.shape[2]} at this hook point but the crosscoder reads "
                f"{crosscoder.b_dec.shape[1]}. Use the pair and hook point that it was trained on."
            )
        x = x.to(crosscoder.b_enc.device).float()
        for chunk in x.split(_CHUNK):
            active = selection.active(crosscoder.pre_acts(crosscoder.normalise(chunk)), crosscoder.gate_at())
            decoded = sparse.decode(active, crosscoder.W_dec.detach().flatten(1)).view_as(chunk) + crosscoder.b_dec
            x_hat.append(crosscoder.denormalise(decoded))
            entries.append(active)
        return Parts(x, torch.cat(x_hat), entries, is_template.to(x.device))

    def latents_difference(self, parts: Parts, latents: tuple[int, ...]) -> Float[Tensor, "tokens d_model"]:
        """Return sum_{j in S} f_j (D_j^tuned - D_j^base)."""
        weight = torch.zeros(self.dict_size, device=parts.x.device)
        weight[list(latents)] = 1.0
        chosen = [replace(entries, values=entries.values * weight[entries.latents]) for entries in parts.entries]
        return torch.cat([sparse.decode(entries, self.difference) for entries in chosen])

    @torch.no_grad()
    def patched(self, parts: Parts, patch: PatchSet, target: int) -> Float[Tensor, "tokens d_model"]:
        """Return the activation that goes into model `target` (0 base, 1 tuned) in place of its own."""
        own, other = parts.x_hat[:, target], parts.x_hat[:, 1 - target]
        source = parts.x[:, 1 - target]
        sign = 1.0 if target == 1 else -1.0
        if patch.kind == "none":
            return source
        if patch.kind == "all":
            return source + (own - other)
        if patch.kind == "error":
            return source + (parts.x[:, target] - own) - (source - other)
        if patch.kind == "bias":
            return source + sign * self.bias_difference
        if patch.kind == "template":
            return torch.where(parts.is_template[:, None], source + (own - other), source)
        if patch.kind == "reconstruction":
            return own
        if patch.kind == "cross_reconstruction":
            return other
        return source + sign * self.latents_difference(parts, patch.latents)


def _towards(table: pandas.DataFrame, target: int) -> Float[np.ndarray, " latents"]:
    """Return the relative decoder norm seen from the target: 1 where only the target has the latent."""
    norm = table["relative_decoder_norm"].to_numpy()
    return norm if target == 1 else 1 - norm


Order = Int[np.ndarray, " alive"]
Lengths = Float[np.ndarray, " dict_size"]


def orders(table: pandas.DataFrame, target: int, difference: Lengths) -> dict[str, Order]:
    """Order the alive latents, most specific to model `target` or most different first, by each score.

    difference: `decoder_difference` of every latent.

    scaling: rank by |nu_error| plus rank by |nu_reconstruction|, both of the target's own decoder (the mirror ratios
    for the base model), smallest sum first; latents that are weaker in the target (relative norm on the other side of
    0.5) come after all others. norm: relative decoder norm towards the target. difference: decoder difference, largest
    first. cosine: decoder cosine, lowest first. The last two know of no target. Ties go to the lower number.
    Source: Minder et al. 2025, arXiv 2504.02922, who take both ranks of `scaling` within their tuned-only class.
    """
    alive = alive_latents(table)
    rows, suffix = table.iloc[alive], "" if target == 1 else "_mirror"
    towards = _towards(rows, target)
    error, reconstruction = rows[f"nu_error{suffix}"].abs().rank(), rows[f"nu_reconstruction{suffix}"].abs().rank()
    scaling = np.lexsort(((error + reconstruction).to_numpy(), towards < 0.5))
    smallest = {"norm": -towards, "difference": -difference[alive], "cosine": rows["decoder_cosine"].to_numpy()}
    return {"scaling": alive[scaling]} | {
        score: alive[np.argsort(values, kind="stable")] for score, values in smallest.items()
    }


def random_sets(
    table: pandas.DataFrame, n: int, *, draws: int, seed: int, like: Int[np.ndarray, " n"] | None = None
) -> list[tuple[int, ...]]:
    """Draw n alive latents without replacement, several times.

    `like`: as many from each tenth of the alive latents by frequency as these latents have.
    """
    generator = np.random.default_rng(seed)
    alive = alive_latents(table)
    if like is None:
        return [tuple(generator.choice(alive, n, replace=False).tolist()) for _ in range(draws)]
    by_frequency = alive[np.argsort(table["n_active"].to_numpy()[alive], kind="stable")]
    tenths = np.array_split(by_frequency, min(10, len(alive)))
    counts = [int(np.isin(like, tenth).sum()) for tenth in tenths]
    return [
        tuple(
            int(j) for tenth, c in zip(tenths, counts, strict=True) for j in generator.choice(tenth, c, replace=False)
        )
        for _ in range(draws)
    ]


def choose_sets(
    table: pandas.DataFrame,
    target: int,
    difference: Lengths,
    *,
    n_latents: list[int],
    draws: int,
    seed: int,
    match_frequency: bool = False,
    latents: list[int] | None = None,
) -> list[PatchSet]:
    """Return every set of one direction; the draws of one random set share a name.

    difference: `decoder_difference` of every latent.

    Raises:
        InputError: a latent number out of range or twice, an empty list, more latents than are alive.
    """
    n_alive = len(alive_latents(table))
    n_leaning = int(
        (_towards(table.iloc[alive_latents(table)], target) >= 0.5).sum()
    )  # the first ones by scaling and by norm
    sets = [PatchSet(kind, kind) for kind in WHOLE]
    ordered = orders(table, target, difference)
    for score in ("scaling", "norm"):  # the others do not put leaning latents first
        order = ordered[score]
        best, worst = order[: n_leaning // 2], order[n_leaning // 2 : n_leaning]
        sets.append(PatchSet(f"best_half.{score}", "latents", tuple(best.tolist())))
        sets.append(PatchSet(f"worst_half.{score}", "latents", tuple(worst.tolist())))
    for n in dict.fromkeys(n_latents):
        if not 1 <= n <= n_alive:
            raise InputError(f"n_latents is {n}; give a number from 1 to {n_alive}, the alive latents of the table.")
        sets += [PatchSet(f"top_{n}.{score}", "latents", tuple(order[:n].tolist())) for score, order in ordered.items()]
        like = ordered["scaling"][:n] if match_frequency else None
        drawn = random_sets(table, n, draws=draws, seed=seed, like=like)
        sets += [PatchSet(f"top_{n}.random", "latents", chosen) for chosen in drawn]
    if latents is not None:
        sets.append(PatchSet("chosen", "latents", require_latents(latents, len(table))))
    return sets
