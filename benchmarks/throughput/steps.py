"""What is timed and its data: our training step, the same step in dense autograd, the encoder's product alone.

`our_step` is the one place of the benchmarks that knows how a training step is taken. Imports go one way:
steps <- adapters <- equality, loading <- memory <- ours, peers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.timing import median_row
from crosscoders import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoders.dictionary import selection
from crosscoders.training.objective import forward
from crosscoders.training.optimizer import Optimizer

Step = Callable[[torch.Tensor], float]
"""Takes a batch (batch, n_models, d_model), makes one training step and gives its loss."""


class Shape(NamedTuple):
    """Sizes of a step, on which its cost depends alone."""

    d_model: int
    dict_size: int
    batch: int
    k: int
    n_models: int = 2

    def __str__(self) -> str:
        return "x".join(str(value) for value in self[:4])

    def config(self) -> TrainConfig:
        """Return BatchTopK with the defaults of training."""
        shape = CrosscoderConfig(dict_size=self.dict_size, k=self.k, d_model=self.d_model, n_models=self.n_models)
        return TrainConfig(crosscoder=shape, batch_size=self.batch)


SHAPES = [Shape(256, 4096, 1024, 32), Shape(512, 16_384, 1024, 64)]


def planted(shape: Shape, n_batches: int = 4) -> list[torch.Tensor]:
    """Return batches of sparse combinations of random directions."""
    g = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.dict_size)
    directions = torch.randn(shape.dict_size, shape.n_models * shape.d_model, generator=g)
    fires = [torch.rand(size, generator=g) < 10 / shape.dict_size for _ in range(n_batches)]
    batches = [(f * torch.rand(size, generator=g)) @ directions for f in fires]
    return [x.view(shape.batch, shape.n_models, shape.d_model) for x in batches]


def start_model(config: CrosscoderConfig, norm: float = 0.3) -> Crosscoder:
    """Return a model with the same weights for the same shape every time."""
    model = Crosscoder(config)
    model.init_weights_(norm=norm, generator=torch.Generator().manual_seed(0))
    return model


def our_step(
    model: Crosscoder,
    config: TrainConfig,
    dead: torch.Tensor | None = None,
    products: torch.dtype = torch.float32,
) -> Step:
    """Return the step of `crosscoders.train`, with `dead` as the latents that take part in the auxiliary term."""
    optimizer, select = Optimizer(model, config), selection.WarmSelection()
    none_dead = torch.zeros(config.crosscoder.dict_size, dtype=torch.bool, device=model.W_dec.device)
    taking_part = none_dead if dead is None else dead

    def step(x: torch.Tensor) -> float:
        k = config.crosscoder.k
        result = forward(model, config, x, dead=taking_part, k=k, step=0, select=select, products=products)
        loss = torch.stack(list(result.terms.values())).sum()
        loss.backward()
        optimizer.step_(1e-4)
        return loss.item()

    return step


def dense_step(
    model: Crosscoder, config: TrainConfig, dead: torch.Tensor | None = None, products: torch.dtype | None = None
) -> Step:
    """Return the same step as plain autograd: dense products, a sort of all latents, default Adam, separate clip.

    With `products`, autocast to that dtype.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        code_norm = model.code_norm.detach()
        positive = torch.relu(model.pre_acts(x))
        if config.crosscoder.k is None:
            latents = positive
        else:
            scaled = (positive * code_norm).detach().flatten()
            mask = torch.zeros_like(scaled)
            mask[scaled.topk(config.crosscoder.k * len(x), sorted=False).indices] = 1
            latents = positive * mask.view_as(positive)
        err = x - model.decode_normalised(latents)
        loss = err.norm(dim=2).mean()
        if config.l1_coefficient:
            loss = loss + config.l1_coefficient * (latents @ model.code_norm).mean()
        if config.crosscoder.k is not None and dead is not None and dead.any():
            loss = loss + config.aux_coefficient * dense_auxiliary(model, positive * code_norm, positive, err, dead)
        return loss

    def step(x: torch.Tensor) -> float:
        with torch.autocast(x.device.type, products, enabled=products is not None):
            loss = loss_of(x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def dense_auxiliary(
    model: Crosscoder, scaled: torch.Tensor, positive: torch.Tensor, err: torch.Tensor, dead: torch.Tensor
) -> torch.Tensor:
    """Return the auxiliary term with every product dense."""
    candidates = torch.where(dead, scaled, -torch.inf).detach()
    chosen = candidates.topk(err.shape[2] // 2, dim=1, sorted=False).indices
    latents = torch.zeros_like(positive).scatter(1, chosen, positive.gather(1, chosen))
    fixed = err.detach()
    missed = (fixed - (latents @ model.W_dec.flatten(1)).view_as(err)).pow(2).sum()
    return missed / (fixed - fixed.mean(dim=0)).pow(2).sum()


def encoder_product(model: Crosscoder, x: torch.Tensor) -> torch.Tensor:
    """Return x W_enc alone, without its bias: the floor of a step."""
    with torch.no_grad():
        return x.flatten(1) @ model.W_enc.flatten(0, 1)


def require_close(name: str, ours: Step, other: Step, batches: list[torch.Tensor], tolerance: float) -> None:
    """Step both over the batches; the losses must agree, or the times would not compare.

    Raises:
        RuntimeError: they do not.
    """
    for x in batches:
        a, b = ours(x), other(x)
        if not abs(a - b) <= tolerance * abs(b):
            raise RuntimeError(f"{name}: our loss {a} differs from the other {b}, so the times do not compare.")


def turns(step: Step, batches: list[torch.Tensor]) -> Callable[[], float]:
    """Return what takes the step on the next batch, round and round."""
    numbers = iter(range(10**9))
    return lambda: step(batches[next(numbers) % len(batches)])


def rate_row(name: str, shape: Shape, seconds: list[float]) -> dict[str, Any]:
    """Return the row of tokens per CPU second of a step."""
    return median_row(f"{name}.tokens_per_second", [shape.batch / s for s in seconds], "tokens/s of CPU time")
