r"""Trained methods: dictionaries as pieces, ordered by how much of the difference each of them writes.

    delta-sae    an SAE (one model) of delta = x_t - x_s:   piece j writes f_j(delta) d_j, bias with none
    crosscoder   of both models:                            f_j(x) (d_j^t - d_j^s), as `diffing causal`

Order: the mean over tokens of ||what the piece writes||, largest first; the control takes alive latents at random.
"""

import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders import ActivationCache, CacheConfig, Crosscoder, TrainConfig, run_cache, train
from crosscoders.activations.stream import BufferedStream, cached_stream
from crosscoders.common.results import row
from crosscoders.training.feed import cache_inputs
from diffing.baselines.delta_sae import differences, one_model_stream, preset_config
from diffing.causal.sets import Exchange, Exchanger, PatchSet
from diffing.comparison.direction_block import Task, piece_rows
from diffing.comparison.inputs import Inputs

_BATCH = 4096


class DeltaExchange:
    """Builds activations with latents of a delta SAE exchanged."""

    def __init__(self, sae: Crosscoder) -> None:
        self.sae = sae
        self.decoder = sae.fold().W_dec[:, 0].detach()

    @torch.no_grad()
    def take_apart(
        self, x: Float[Tensor, "tokens n_models d_model"], is_template: Bool[Tensor, " tokens"]
    ) -> tuple[Tensor, Tensor]:
        """Return the activations of both models, and the latents of their difference."""
        x = x.float()
        return x, self.sae.encode(differences(x))

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


def trained_rows(method: str, inputs: Inputs, which: str, task: Task, folder: Path) -> list[dict[str, Any]]:
    """Train one method, unless it is trained already, and return its rows directions.<method>[.random].*."""
    started, settings = time.perf_counter(), inputs.settings
    cache = pair_cache(inputs, which, task.seed, folder)
    model = train_one(method, cache, folder / method, task.seed, settings.device, settings.train_tokens)
    model = model.requires_grad_(False).to(task.pair.device)
    exchange: Exchanger = DeltaExchange(model) if method == "delta-sae" else Exchange(model)
    written = writes(method, model, cache)
    alive = (written > 0).nonzero()[:, 0]
    order = written.argsort(descending=True).tolist()
    generator = torch.Generator().manual_seed(task.seed)
    pieces = [n for n in settings.pieces if n <= len(alive)]
    sets = [PatchSet("none", "none")]
    sets += [PatchSet(f"{method}.top_{n}", "latents", tuple(order[:n])) for n in pieces]
    for n in pieces:
        drawn = (alive[torch.randperm(len(alive), generator=generator)[:n]] for _ in range(settings.random_draws))
        sets += [PatchSet(f"{method}.random.top_{n}", "latents", tuple(chosen.tolist())) for chosen in drawn]
    rows = [entry | {"name": f"directions.{entry['name']}"} for entry in piece_rows(task, exchange, sets)]
    rows.append(row(f"directions.{method}.alive", len(alive), "latents", model.config.dict_size))
    rows.append(row(f"directions.{method}.trained_tokens", settings.train_tokens, "tokens", 1))
    return [*rows, row(f"directions.{method}.trained_seconds", time.perf_counter() - started, "s", 1)]


def pair_cache(inputs: Inputs, which: str, seed: int, folder: Path) -> ActivationCache:
    """Return a cache of the pair, made where it is not there."""
    settings, info = inputs.settings, inputs.infos[which]
    config = CacheConfig(
        base=info.base, tuned=info.tuned, hook_point=inputs.hook_point, data=settings.data,
        out=str(folder / "cache"), n_tokens=settings.cached_tokens, context_length=settings.context_length,
        tokenizer=info.tokenizer.name_or_path, chat_template=settings.chat_template,
        template_date=settings.template_date, model_dtype=settings.model_dtype, device=settings.device,
        batch_rows=settings.batch_rows, seed=seed,
    )  # fmt: skip
    run_cache(config)
    return ActivationCache(config.out)


def train_one(method: str, cache: ActivationCache, out: Path, seed: int, device: str, n_tokens: int) -> Crosscoder:
    """Train a dictionary of a cache with the preset `demo`, one model of differences for a delta SAE."""
    n_models = 1 if method == "delta-sae" else 2
    config = preset_config(n_models, cache.d_model, n_tokens=n_tokens, seed=seed, device=device)
    stream = one_model_stream(cache, config) if method == "delta-sae" else _paired_stream(cache, config)
    return train(config, stream, out, inputs=cache_inputs(cache) | {"method": method})


def _paired_stream(cache: ActivationCache, config: TrainConfig) -> BufferedStream:
    return cached_stream(cache, batch_size=config.batch_size, buffer_tokens=config.buffer_tokens, seed=config.seed)


@torch.no_grad()
def writes(method: str, model: Crosscoder, cache: ActivationCache) -> Float[Tensor, " dict_size"]:
    """Return the mean over tokens of the length of what each latent writes into the difference."""
    decoder = model.fold().W_dec
    lengths = decoder[:, 0].norm(dim=1) if method == "delta-sae" else (decoder[:, 1] - decoder[:, 0]).norm(dim=1)
    total = torch.zeros(model.config.dict_size, dtype=torch.float64, device=lengths.device)
    for tokens in cache.batches(_BATCH):
        x = differences(tokens.activations) if method == "delta-sae" else tokens.activations.float()
        total += model.encode(x.to(lengths.device)).double().sum(dim=0)
    return (total * lengths / len(cache)).float().cpu()
