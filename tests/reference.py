"""Slow, obvious versions of what the toolkit computes fast: loops and explicit targets, float64."""

import torch
from torch import Tensor

from crosscoders import Crosscoder, TrainConfig
from crosscoders.losses import reconstruction_loss


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
        for target in ("error", "reconstruction", "activation", "activation_no_bias"):
            column = torch.zeros(len(decoder), dtype=torch.float64)
            for j in range(len(decoder)):
                own = f[:, j, None] * decoder[j, m]
                t = {
                    "error": x[:, m] - (x_hat[:, m] - own),
                    "reconstruction": x_hat[:, m],
                    "activation": x[:, m],
                    "activation_no_bias": x[:, m] - bias[m],
                }[target]
                direction = f[:, j, None] * decoder[j, side]
                column[j] = (t * direction).sum() / (direction * direction).sum()
            found[f"beta_{name}_{target}"] = column
    return found


def dense_terms(model: Crosscoder, config: TrainConfig, x: Tensor, *, dead: Tensor, k: int) -> dict[str, Tensor]:
    """Loss terms of BatchTopK by dense matrices and plain autograd."""
    code_norm = model.code_norm.detach()
    positive = torch.relu(model.pre_acts(x))
    chosen = (positive * code_norm).detach().flatten().topk(k * len(x)).indices
    mask = torch.zeros(positive.numel()).index_fill(0, chosen, 1.0).view_as(positive)
    err = x - model.decode_normalised(positive * mask)
    terms = {"reconstruction": reconstruction_loss(err, config.reconstruction)}
    if dead.any():
        scaled = torch.where(dead, positive * code_norm, -1.0).detach()
        k_aux = min(config.k_aux or x.shape[2] // 2, int(dead.sum()))
        kept = torch.zeros_like(positive).scatter(1, scaled.topk(k_aux, dim=1).indices, 1.0) * positive
        err_hat = torch.einsum("nj,jmd->nmd", kept, model.W_dec)
        fixed = err.detach()
        loss = (fixed - err_hat).pow(2).sum() / (fixed - fixed.mean(dim=0)).pow(2).sum()
        terms["auxiliary"] = config.aux_coefficient * loss
    return terms
