"""Slow, obvious versions of what the toolkit computes fast: loops and explicit targets, float64."""

import torch
from torch import Tensor

from crosscoders import Crosscoder, TrainConfig


def latents(cc: Crosscoder, x: Tensor, *, threshold: float | None) -> Tensor:
    """Latents token by token and latent by latent; threshold None: plain ReLU."""
    W_enc, W_dec = cc.W_enc.detach().double(), cc.W_dec.detach().double()
    x = (x.double() - cc.input_mean.double()) * cc.input_scale.double()[:, None]
    out = torch.zeros(len(x), W_dec.shape[0], dtype=torch.float64)
    for n in range(len(x)):
        for j in range(W_dec.shape[0]):
            pre = float(cc.b_enc[j]) + sum(float(x[n, m] @ W_enc[m, :, j]) for m in range(x.shape[1]))
            norms = [float(W_dec[j, m].norm()) for m in range(x.shape[1])]
            c = {"sum": sum(norms), "concat": sum(v * v for v in norms) ** 0.5, "none": 1.0}[cc.config.code_norm]
            if pre > 0 and (threshold is None or pre * c > threshold):
                out[n, j] = pre
    return out


def betas(cc: Crosscoder, x: Tensor, f: Tensor, *, side: int) -> dict[str, Tensor]:
    """Latent Scaling by building every target, also the error target of each latent; training space."""
    decoder, bias = cc.W_dec.detach().double(), cc.b_dec.detach().double()
    x = (x.double() - cc.input_mean.double()) * cc.input_scale.double()[:, None]
    x_hat = torch.einsum("nj,jmd->nmd", f, decoder) + bias
    found: dict[str, Tensor] = {}
    for m, name in enumerate(("base", "tuned")):
        for target in ("error", "reconstruction", "reconstruction_no_bias", "activation", "activation_no_bias"):
            column = torch.zeros(len(decoder), dtype=torch.float64)
            for j in range(len(decoder)):
                own = f[:, j, None] * decoder[j, m]
                t = {
                    "error": x[:, m] - (x_hat[:, m] - own),
                    "reconstruction": x_hat[:, m],
                    "reconstruction_no_bias": x_hat[:, m] - bias[m],
                    "activation": x[:, m],
                    "activation_no_bias": x[:, m] - bias[m],
                }[target]
                direction = f[:, j, None] * decoder[j, side]
                column[j] = (t * direction).sum() / (direction * direction).sum()
            found[f"beta_{name}_{target}"] = column
    return found


def dense_terms(
    model: Crosscoder, config: TrainConfig, x: Tensor, *, dead: Tensor | None = None, k: int | None = None
) -> dict[str, Tensor]:
    """Loss terms by dense matrices and plain autograd; k None: ReLU with the L1 term."""
    norms = model.W_dec.norm(dim=2)
    c = {"sum": norms.sum(dim=1), "concat": norms.norm(dim=1), "none": torch.ones(len(norms))}[model.config.code_norm]
    f = torch.relu(torch.einsum("nmd,mdj->nj", x, model.W_enc) + model.b_enc)
    positive = f
    if k is not None:
        chosen = (f * c).detach().flatten().topk(k * len(x)).indices
        f = f * torch.zeros(f.numel()).index_fill(0, chosen, 1.0).view_as(f)
    err = x - torch.einsum("nj,jmd->nmd", f, model.W_dec) - model.b_dec
    norm = config.reconstruction == "norm"
    terms = {"reconstruction": err.norm(dim=2).mean() if norm else err.pow(2).sum(dim=(1, 2)).mean()}
    if k is None:
        terms["sparsity"] = config.l1_coefficient * (f * c).sum(dim=1).mean()
    if dead is not None and dead.any():
        scaled = torch.where(dead, positive * c, -1.0).detach()
        k_aux = min(config.k_aux or x.shape[2] // 2, int(dead.sum()))
        kept = torch.zeros_like(positive).scatter(1, scaled.topk(k_aux, dim=1).indices, 1.0) * positive
        err_hat = torch.einsum("nj,jmd->nmd", kept, model.W_dec)
        fixed = err.detach()
        loss = (fixed - err_hat).pow(2).sum() / (fixed - fixed.mean(dim=0)).pow(2).sum()
        terms["auxiliary"] = config.aux_coefficient * loss
    return terms
