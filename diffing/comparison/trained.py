r"""Trained dictionaries: their latents as pieces, in several orders.

    delta-sae             an SAE (one model) of delta = x_t - x_s:   piece j writes f_j(delta) d_j, bias with none
    base-sae              an SAE of x_s alone, in both models:       (f_j(x_t) - f_j(x_s)) d_j
    crosscoder            of both models:                            f_j(x) (d_j^t - d_j^s), as `diffing causal`
    crosscoder-norm       the same, by relative decoder norm
    crosscoder-scaling    the same, by Latent Scaling (`diffing.causal.sets.orders`)
    latents               a score per token: what the first 32 of these write

Order, but for the last two: the mean over tokens of ||what the piece writes||, largest first; the control takes alive
latents at random.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders import ActivationCache, CacheConfig, Crosscoder, TrainConfig, run_cache, train
from crosscoders.activations.stream import BufferedStream, cached_stream
from crosscoders.common.results import row
from crosscoders.training.feed import cache_inputs
from diffing.baselines.delta_sae import base_alone, differences, one_model_stream, preset_config
from diffing.causal.sets import Exchange, Exchanger, PatchSet, orders
from diffing.comparison.direction_block import Task, of_method, piece_rows
from diffing.comparison.inputs import Inputs
from diffing.latents.decoder_norms import decoder_difference
from diffing.latents.table import latent_table, scale_cache

_BATCH = 4096
_SCORES = {"crosscoder-norm": "norm", "crosscoder-scaling": "scaling"}
SCORED = 32
"""Latents whose writing is a token's score."""
Lengths = Float[Tensor, " dict_size"]


class ChangeExchange:
    """Builds activations with what latents of an SAE of one model write into the difference."""

    def __init__(self, name: str, sae: Crosscoder) -> None:
        self.name, self.sae = name, sae
        self.decoder = sae.fold().W_dec[:, 0].detach()

    @torch.no_grad()
    def take_apart(
        self, x: Float[Tensor, "tokens n_models d_model"], is_template: Bool[Tensor, " tokens"]
    ) -> tuple[Tensor, Tensor]:
        """Return the activations of both models, and by how much each latent writes into their difference."""
        return x.float(), changes(self.name, self.sae, x)

    @torch.no_grad()
    def patched(self, parts: tuple[Tensor, Tensor], patch: PatchSet, target: int) -> Float[Tensor, "tokens d_model"]:
        """Return the activation that goes into model `target` (0 base, 1 tuned) in place of its own."""
        x, latents = parts
        source = x[:, 1 - target]
        if patch.kind == "none":
            return source
        assert patch.kind == "latents"
        chosen = list(patch.latents)
        return source + (1.0 if target == 1 else -1.0) * latents[:, chosen] @ self.decoder[chosen]


class Written(NamedTuple):
    """What each latent of a dictionary writes into the difference, over the tokens of a cache."""

    length: Lengths
    """Mean length, inactive tokens with 0."""
    density: Lengths
    """Share of tokens on which it writes."""


def changes(
    name: str, model: Crosscoder, x: Float[Tensor, "tokens n_models d_model"]
) -> Float[Tensor, "tokens dict_size"]:
    """Return by how much each latent of dictionary `name` writes into the difference."""
    if name == "delta-sae":
        return model.encode(differences(x))
    if name == "base-sae":
        return model.encode(x[:, 1:].float()) - model.encode(base_alone(x))
    return model.encode(x.float())


def dictionary_rows(
    name: str, methods: Sequence[str], inputs: Inputs, which: str, task: Task, folder: Path
) -> list[dict[str, Any]]:
    """Train one dictionary, unless it is trained already, and return rows directions.<method>[.random].* of its
    methods."""
    started, settings = time.perf_counter(), inputs.settings
    model, cache = trained(name, inputs, which, task.seed, folder)
    trained_seconds = time.perf_counter() - started
    model = model.to(task.pair.device)
    exchange: Exchanger = Exchange(model) if name == "crosscoder" else ChangeExchange(name, model)
    written = writes(name, model, cache)
    alive = (written.density > 0).nonzero()[:, 0]
    ordered = _orders(methods, model, cache, written)
    pieces = [n for n in settings.pieces if n <= len(alive)]
    sets = [PatchSet("none", "none")]
    for method, order in ordered.items():
        sets += [PatchSet(f"{method}.top_{n}", "latents", tuple(order[:n])) for n in pieces if n <= len(order)]
    generator = torch.Generator().manual_seed(task.seed)
    for n in pieces:
        drawn = (alive[torch.randperm(len(alive), generator=generator)[:n]] for _ in range(settings.random_draws))
        sets += [PatchSet(f"random.top_{n}", "latents", tuple(chosen.tolist())) for chosen in drawn]
    sets.append(PatchSet("every", "latents", tuple(alive.tolist())))
    measured = piece_rows(task, exchange, sets)
    rows = []
    for method, order in ordered.items():
        rows += of_method(measured, method, "random")
        rows += [entry | {"name": f"directions.{method}.{entry['name']}"} for entry in measured
                 if entry["name"].startswith("every.")]  # fmt: skip
        rows += [row(f"directions.{method}.top_{n}.numbers", float(written.density[order[:n]].sum()), "numbers/token",
                     len(cache)) for n in pieces if n <= len(order)]  # fmt: skip
        rows.append(row(f"directions.{method}.alive", len(alive), "latents", model.config.dict_size))
        rows.append(row(f"directions.{method}.trained_tokens", settings.train_tokens, "tokens", 1))
        rows.append(row(f"directions.{method}.trained_seconds", trained_seconds / len(methods), "s", 1))
    return rows


def trained(name: str, inputs: Inputs, which: str, seed: int, folder: Path) -> tuple[Crosscoder, ActivationCache]:
    """Return a dictionary of a pair and the cache that it was trained on, both made where they are not there."""
    settings, cache = inputs.settings, pair_cache(inputs, which, seed, folder)
    model = train_one(name, cache, folder / name, seed, settings.device, settings.train_tokens)
    return model.requires_grad_(False), cache


def latent_scores(
    inputs: Inputs, which: str, seed: int, folder: Path, x: Float[Tensor, "tokens 2 d_model"]
) -> Float[np.ndarray, " tokens"]:
    """Return the length of what the first SCORED latents of a crosscoder by Latent Scaling write into the difference of
    each token, ||sum_j f_j (d_j^t - d_j^s)||."""
    model, cache = trained("crosscoder", inputs, which, seed, folder)
    model = model.to(x.device)
    first = by_score(model, cache)["scaling"][:SCORED].tolist()
    decoder = model.fold().W_dec
    difference = (decoder[:, 1] - decoder[:, 0])[first]
    with torch.no_grad():
        lengths = [(model.encode(part)[:, first] @ difference).norm(dim=1) for part in x.split(_BATCH)]
    return torch.cat(lengths).double().numpy()


def _orders(
    methods: Sequence[str], model: Crosscoder, cache: ActivationCache, written: Written
) -> dict[str, list[int]]:
    """Return the alive latents in the order of each method."""
    by_length = written.length.argsort(descending=True).tolist()
    ordered = {method: by_length for method in methods}
    scored = {method: _SCORES[method] for method in methods if method in _SCORES}
    if scored:
        of_score = by_score(model, cache)
        ordered |= {method: of_score[score].tolist() for method, score in scored.items()}
    return ordered


def by_score(model: Crosscoder, cache: ActivationCache) -> dict[str, Int[np.ndarray, " alive"]]:
    """Return the alive latents of a crosscoder in the orders of `diffing causal`, tuned ones first."""
    table = latent_table(model, scale_cache(model, cache)[0])
    return orders(table, 1, decoder_difference(model).cpu().numpy())


def pair_cache(inputs: Inputs, which: str, seed: int, folder: Path) -> ActivationCache:
    """Return a cache of the pair, made where it is not there."""
    settings, info = inputs.settings, inputs.infos[which]
    config = CacheConfig(
        base=info.base, tuned=info.tuned, hook_point=inputs.hook_point, data=inputs.train_data(),
        out=str(folder / "cache"), n_tokens=settings.cached_tokens, context_length=settings.context_length,
        tokenizer=info.tokenizer.name_or_path, chat_template=settings.chat_template,
        template_date=settings.template_date, model_dtype=settings.model_dtype, device=settings.device,
        batch_rows=settings.batch_rows, seed=seed,
    )  # fmt: skip
    run_cache(config)
    return ActivationCache(config.out)


def train_one(name: str, cache: ActivationCache, out: Path, seed: int, device: str, n_tokens: int) -> Crosscoder:
    """Train a dictionary of a cache with the preset `demo`, of one model for an SAE."""
    n_models = 2 if name == "crosscoder" else 1
    config = preset_config(n_models, cache.d_model, n_tokens=n_tokens, seed=seed, device=device)
    if name == "crosscoder":
        stream = _paired_stream(cache, config)
    else:
        stream = one_model_stream(cache, config, differences if name == "delta-sae" else base_alone)
    return train(config, stream, out, inputs=cache_inputs(cache) | {"method": name})


def _paired_stream(cache: ActivationCache, config: TrainConfig) -> BufferedStream:
    return cached_stream(cache, batch_size=config.batch_size, buffer_tokens=config.buffer_tokens, seed=config.seed)


@torch.no_grad()
def writes(name: str, model: Crosscoder, cache: ActivationCache) -> Written:
    """Return how much and how often each latent writes into the difference."""
    decoder = model.fold().W_dec
    lengths = (decoder[:, 1] - decoder[:, 0] if name == "crosscoder" else decoder[:, 0]).norm(dim=1)
    total, active = (torch.zeros(model.config.dict_size, dtype=torch.float64, device=lengths.device) for _ in range(2))
    for tokens in cache.batches(_BATCH):
        written = changes(name, model, tokens.activations.to(lengths.device))
        total += written.abs().double().sum(dim=0)
        active += (written != 0).sum(dim=0)
    return Written((total * lengths / len(cache)).float().cpu(), (active / len(cache)).float().cpu())
