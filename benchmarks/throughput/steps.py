"""Our training step against the encoder's matrix product alone and against a dense autograd step.

`our_step` is the one place of the benchmarks that knows how a training step is taken.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.throughput import memory
from benchmarks.timing import interleaved, median_row, ratio_row
from crosscoders import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoders.dictionary import selection
from crosscoders.training.objective import forward
from crosscoders.training.optimizer import Optimizer

Step = Callable[[torch.Tensor], float]
"""Takes a batch (batch, n_models, d_model), makes one training step and gives its loss."""


class Shape(NamedTuple):
    """What a step costs depends on nothing else."""

    d_model: int
    dict_size: int
    batch: int
    k: int
    n_models: int = 2

    def __str__(self) -> str:
        return "x".join(str(value) for value in self[:4])

    def config(self) -> TrainConfig:
        """BatchTopK with the defaults of training."""
        shape = CrosscoderConfig(dict_size=self.dict_size, k=self.k, d_model=self.d_model, n_models=self.n_models)
        return TrainConfig(crosscoder=shape, batch_size=self.batch)


TRAINED = 0.04
"""Share of active latents of an L1 crosscoder in training, after its first fifth of the steps (docs/performance.md)."""
SHAPES = [Shape(256, 4096, 1024, 32), Shape(512, 16_384, 1024, 64)]


def planted(shape: Shape, n_batches: int = 4) -> list[torch.Tensor]:
    """Batches of sparse combinations of random directions."""
    g = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.dict_size)
    directions = torch.randn(shape.dict_size, shape.n_models * shape.d_model, generator=g)
    fires = [torch.rand(size, generator=g) < 10 / shape.dict_size for _ in range(n_batches)]
    made = [(f * torch.rand(size, generator=g)) @ directions for f in fires]
    return [x.view(shape.batch, shape.n_models, shape.d_model) for x in made]


def start_model(config: CrosscoderConfig, norm: float = 0.3) -> Crosscoder:
    """The same weights for the same shape every time."""
    model = Crosscoder(config)
    model.init_weights_(norm=norm, generator=torch.Generator().manual_seed(0))
    return model


def our_step(
    model: Crosscoder,
    config: TrainConfig,
    dead: torch.Tensor | None = None,
    products: torch.dtype = torch.float32,
) -> Step:
    """The step of `crosscoders.train`, with `dead` as the latents that take part in the auxiliary term."""
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
    """The same step as a plain autograd program: dense products, a sort of all latents, default Adam, separate clip.

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
    """The auxiliary term with every product dense."""
    candidates = torch.where(dead, scaled, -torch.inf).detach()
    chosen = candidates.topk(err.shape[2] // 2, dim=1, sorted=False).indices
    kept = torch.zeros_like(positive).scatter(1, chosen, positive.gather(1, chosen))
    fixed = err.detach()
    missed = (fixed - (kept @ model.W_dec.flatten(1)).view_as(err)).pow(2).sum()
    return missed / (fixed - fixed.mean(dim=0)).pow(2).sum()


def encoder_product(model: Crosscoder, x: torch.Tensor) -> torch.Tensor:
    """x W_enc alone, without its bias: the floor of a step."""
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
    """The step on the next batch, round and round."""
    numbers = iter(range(10**9))
    return lambda: step(batches[next(numbers) % len(batches)])


def compare(
    name: str,
    config: TrainConfig,
    shape: Shape,
    *,
    dead_share: float = 0.0,
    active_share: float | None = None,
    n_rounds: int,
) -> dict[str, list[float]]:
    """CPU seconds of the encoder's product, our step and the dense one, after checking that their losses agree.

    active_share: with biases at which each latent is active on that share of the first batch.
    """
    batches = planted(shape)
    dead = torch.rand(shape.dict_size, generator=torch.Generator().manual_seed(1)) < dead_share
    models = [start_model(config.crosscoder) for _ in range(2)]
    if active_share is not None:
        cut = encoder_product(models[0], batches[0]).quantile(1 - active_share, dim=0)
        for model in models:
            model.b_enc.data.copy_(-cut)
    ours, dense = our_step(models[0], config, dead), dense_step(models[1], config, dead)
    require_close(name, ours, dense, batches, 1e-4)
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: encoder_product(models[0], batches[0]),
        "ours": turns(ours, batches),
        "dense": turns(dense, batches),
    }
    return interleaved(parts, n_rounds=n_rounds)


def rate_row(name: str, shape: Shape, seconds: list[float]) -> dict[str, Any]:
    """Tokens per CPU second of a step."""
    return median_row(f"{name}.tokens_per_second", [shape.batch / s for s in seconds], "tokens/s of CPU time")


def step_rows(shape: Shape, *, dead_share: float = 0.0, n_rounds: int) -> list[dict[str, Any]]:
    """BatchTopK; with `dead_share`, that share of the latents takes part in the auxiliary term."""
    name = f"throughput.step.{shape}" + (".aux" if dead_share else "")
    seconds = compare(name, shape.config(), shape, dead_share=dead_share, n_rounds=n_rounds)
    return [
        ratio_row(f"{name}.ratio_to_encode", seconds["ours"], seconds["encode"], "encoder products"),
        ratio_row(f"{name}.speedup_over_dense", seconds["dense"], seconds["ours"], "times"),
        rate_row(name, shape, seconds["ours"]),
        median_row(
            f"{name}.encode.gflop_per_second", [encode_flops(shape) / s / 1e9 for s in seconds["encode"]], "GFLOP/s"
        ),
    ]


def encode_flops(shape: Shape) -> int:
    """Of one encoder product."""
    return 2 * shape.batch * shape.n_models * shape.d_model * shape.dict_size


def relu_rows(shape: Shape, *, active_share: float | None = None, n_rounds: int) -> list[dict[str, Any]]:
    """L1: five dense products are the least that a step needs (forward 2, decoder backward 2, encoder backward 1)
    while latents are dense, as at the start; with `active_share`, when so few are active."""
    name = f"throughput.step.{shape.d_model}x{shape.dict_size}x{shape.batch}.l1"
    name += "" if active_share is None else f".active_{active_share:.0%}".replace("%", "_percent")
    relu = CrosscoderConfig(dict_size=shape.dict_size, activation="relu", d_model=shape.d_model)
    config = replace(shape.config(), crosscoder=relu, threshold_start_step=0, l1_coefficient=0.01)
    seconds = compare(name, config, shape, active_share=active_share, n_rounds=n_rounds)
    floor = [5 * value for value in seconds["encode"]]
    return [
        ratio_row(f"{name}.share_of_dense_roof", floor, seconds["ours"], "fraction"),
        ratio_row(f"{name}.speedup_over_dense", seconds["dense"], seconds["ours"], "times"),
        rate_row(name, shape, seconds["ours"]),
    ]


def memory_rows(shape: Shape, *, n_processes: int) -> list[dict[str, Any]]:
    """Ours and the dense step, each in processes of its own."""
    grown = {kind: memory.measure(kind, shape, n_processes) for kind in ("ours", "dense")}
    names = {"ours": f"throughput.step.{shape}", "dense": f"throughput.step.{shape}.dense"}
    return [median_row(f"{names[kind]}.peak_memory_growth", found, "MiB") for kind, found in grown.items() if found]


def rows(quick: bool) -> list[dict[str, Any]]:
    """Rows `throughput.step.*` of our own implementations."""
    found, n_rounds = [], 3 if quick else 9
    for shape in SHAPES[: 1 if quick else None]:
        for dead_share in (0.0, 0.3):
            found += step_rows(shape, dead_share=dead_share, n_rounds=n_rounds)
        found += relu_rows(shape, n_rounds=n_rounds) + relu_rows(shape, active_share=TRAINED, n_rounds=n_rounds)
        found += memory_rows(shape, n_processes=1 if quick else 3)
    return found
