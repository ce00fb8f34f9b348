"""Small training runs that several test files make."""

from pathlib import Path

import torch

from crosscoders import (
    Crosscoder,
    CrosscoderConfig,
    TrainConfig,
    tensor_stream,
    train,
)


def config(**changes: object) -> TrainConfig:
    """Return settings of 40 steps of 32 tokens, 12 latents."""
    settings: dict[str, object] = {
        "crosscoder": CrosscoderConfig(dict_size=12, k=3), "n_tokens": 1280, "batch_size": 32, "lr": 1e-2,
        "lr_warmup_steps": 2, "threshold_start_step": 5, "threshold_beta": 0.9, "dead_after_tokens": 200,
        "log_every": 10, "checkpoint_every": 10, "input_norm": "sqrt_d",
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def activations(n: int = 500, d_model: int = 6) -> torch.Tensor:
    """Return sparse combinations of 8 directions, differently turned in each model."""
    g = torch.Generator().manual_seed(4)
    f = torch.rand(n, 8, generator=g) * (torch.rand(n, 8, generator=g) < 0.3)
    return torch.einsum("nj,jmd->nmd", f, torch.randn(8, 2, d_model, generator=g)) + 0.3


def weights(folder: Path) -> bytes:
    """Return the bytes of a finished run's weights."""
    return (folder / "model.safetensors").read_bytes()


def run(folder: Path, settings: TrainConfig | None = None, x: torch.Tensor | None = None) -> Crosscoder:
    """Train in a folder, on the activations above unless others are given; all of them are evaluated on."""
    settings, x = settings or config(), activations() if x is None else x
    stream = tensor_stream(x, batch_size=settings.batch_size, buffer_tokens=200, seed=settings.seed)
    return train(settings, stream, folder, holdout=lambda: x.split(100))
