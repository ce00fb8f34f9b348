"""Latent Scaling, all targets in one pass, against one full pass for each target.

The per-target formulation is the published one, written plainly, with dense latents: for a target T of model m,
beta_j = sum_n f_nj <T_n, d_j> / (||d_j||^2 sum_n f_nj^2), d_j the tuned decoder. The error target
T = x - (x_hat - f_j d_j) is built for each latent. Source: Minder et al. 2025 (arXiv 2504.02922). All eight betas of
both are compared first; ours also gives the mirror image and standard errors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.throughput.steps import Shape, planted, start_model
from benchmarks.timing import interleaved, ratio_row
from crosscoders import Crosscoder
from diffing.latents.latent_scaling import MODELS, TARGETS, scale_latents

SHAPE = Shape(128, 1024, 1024, 24)
"""Small: the error target is one (batch, d_model) matrix for each latent."""
LATENTS_AT_ONCE = 32


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the rows `throughput.scaling.<shape>.*`."""
    return scaling_rows(SHAPE, n_batches=1 if quick else 4, n_rounds=3 if quick else 5)


@torch.no_grad()
def per_target(crosscoder: Crosscoder, batches: list[Tensor], model: int, target: str) -> Tensor:
    """Return beta of every latent on one target of one model, by a pass of its own."""
    decoder = crosscoder.W_dec[:, 1]
    numerator, square = torch.zeros(2, len(decoder), dtype=torch.float64)
    for x in batches:
        latents = crosscoder.encode(x)
        if target == "error":
            x_hat = crosscoder.decode(latents)[:, model]
            numerator += error_numerator(x[:, model] - x_hat, latents, crosscoder.W_dec[:, model], decoder)
        else:
            y = x[:, model]
            if target.startswith("reconstruction"):
                y = crosscoder.decode(latents)[:, model]
            if target.endswith("_no_bias"):
                y = y - crosscoder.b_dec[model]
            numerator += (decoder * (latents.T @ y)).sum(dim=1)
        square += latents.pow(2).sum(dim=0)
    betas = numerator / (decoder.pow(2).sum(dim=1) * square)
    return torch.where(torch.isfinite(betas), betas, 0.0)


def error_numerator(err: Tensor, latents: Tensor, own: Tensor, decoder: Tensor) -> Tensor:
    """Return sum_n f_nj <err_n + f_nj own_j, d_j>, the target built for some latents at a time."""
    parts = []
    for f, o, d in zip(
        latents.T.split(LATENTS_AT_ONCE), own.split(LATENTS_AT_ONCE), decoder.split(LATENTS_AT_ONCE), strict=True
    ):
        targets = err + f[:, :, None] * o[:, None, :]  # (latents, batch, d_model)
        parts.append(torch.einsum("jn,jnd,jd->j", f, targets, d))
    return torch.cat(parts)


def require_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Require every beta to agree within 1e-4 of the largest of its column.

    Raises:
        RuntimeError: a column does not.
    """
    for name, betas in theirs.items():
        gap = (ours[name] - betas).abs().max()
        if not gap <= 1e-4 * betas.abs().max():
            raise RuntimeError(f"{name}: the two formulations differ by {gap:.3g}, so their times do not compare.")


def scaling_rows(shape: Shape, *, n_batches: int, n_rounds: int) -> list[dict[str, Any]]:
    """Time ours on all targets, against all eight passes and against the six that build no error target."""
    batches = planted(shape, n_batches)
    crosscoder = start_model(shape.config().crosscoder, norm=1.0).requires_grad_(False)
    crosscoder.b_dec.normal_(generator=torch.Generator().manual_seed(1))
    scaled = crosscoder.encode(batches[0], gate="relu") * crosscoder.code_norm
    crosscoder.threshold.copy_(scaled.flatten().topk(shape.k * shape.batch).values[-1])

    def passes(targets: tuple[str, ...]) -> dict[str, Tensor]:
        return {
            f"beta_{name}_{target}": per_target(crosscoder, batches, model, target)
            for target in targets
            for model, name in enumerate(MODELS)
        }

    linear = tuple(target for target in TARGETS if target != "error")
    require_equal(scale_latents(crosscoder, batches), passes(TARGETS))
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: [crosscoder.encode(x) for x in batches],
        "ours": lambda: scale_latents(crosscoder, batches),
        "linear": lambda: passes(linear),
        "error": lambda: passes(("error",)),
    }
    seconds = interleaved(parts, n_rounds=n_rounds, n_warmup=1)
    name = f"throughput.scaling.{shape}"
    both = [a + b for a, b in zip(seconds["linear"], seconds["error"], strict=True)]
    note = f"all targets and standard errors, {n_batches * shape.batch:,} tokens"
    return [
        ratio_row(f"{name}.ratio_to_encode", seconds["ours"], seconds["encode"], "encoder passes", note),
        ratio_row(f"{name}.speedup_over_per_target", both, seconds["ours"], "times", "over eight passes"),
        ratio_row(
            f"{name}.speedup_over_per_target_linear", seconds["linear"], seconds["ours"], "times",
            "over the six passes without an error target; ours does all eight",
        ),
    ]  # fmt: skip
