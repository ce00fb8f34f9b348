"""A small crosscoder in which no two numbers are equal, and data for it."""

from pathlib import Path

import torch

from crosscoders import Crosscoder, CrosscoderConfig

PARITY = Path(__file__).parent / "data" / "parity"


def make(activation: str = "batchtopk", code_norm: str = "sum", seed: int = 0, n_models: int = 2) -> Crosscoder:
    """3 wide, 7 latents, everything different from 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    config = CrosscoderConfig(
        dict_size=7, d_model=3, n_models=n_models, activation=activation, k=2 if activation == "batchtopk" else None,
        code_norm=code_norm,
    )  # type: ignore[arg-type]  # fmt: skip
    cc = Crosscoder(config)
    with torch.no_grad():
        for p in cc.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
        cc.input_scale.copy_(torch.tensor([0.5, 2.0, 1.5])[:n_models])
        cc.input_mean.copy_(torch.randn(n_models, 3, generator=g))
        cc.threshold.fill_(1.5)
    return cc.requires_grad_(False)


def sample(n: int = 20, n_models: int = 2) -> torch.Tensor:
    return torch.randn(n, n_models, 3, generator=torch.Generator().manual_seed(9))
