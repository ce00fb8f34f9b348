"""The weight c_j that a latent has by its decoder norms, and its gradient in closed form."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def code_norm_factors(norms: Float[Tensor, "dict_size n_models"], rule: str) -> Float[Tensor, "dict_size n_models"]:
    r"""Return what d_jm is multiplied by in d c_j / d d_jm.

    sum: 1 / ||d_jm||. concat: 1 / ||d_j||. 0 where that norm is 0, and for none.
    """
    if rule == "none":
        return torch.zeros_like(norms)
    lengths = norms if rule == "sum" else code_norm(norms, rule)[:, None].expand_as(norms)
    return torch.where(lengths > 0, 1 / lengths, 0.0)


class _CodeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_dec: Tensor, norms: Tensor, rule: str) -> Tensor:
        ctx.save_for_backward(W_dec, code_norm_factors(norms, rule))
        return code_norm(norms, rule)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        W_dec, factors = ctx.saved_tensors
        return W_dec * (grads[0][:, None] * factors)[:, :, None], None, None


def differentiable_code_norm(
    W_dec: Float[Tensor, "dict_size n_models d_model"], norms: Float[Tensor, "dict_size n_models"], rule: str
) -> Float[Tensor, " dict_size"]:
    """Return c_j from decoder norms that are known already, with its gradient in closed form."""
    return code_norm(norms, rule) if rule == "none" else _CodeNorm.apply(W_dec, norms, rule)


def code_norm(decoder_norms: Float[Tensor, "dict_size n_models"], rule: str) -> Float[Tensor, " dict_size"]:
    r"""Return the weight c_j of each latent in selection and in the L1 term.

    sum: c_j = sum_m ||d_j^m||. concat: c_j = sqrt(sum_m ||d_j^m||^2). none: c_j = 1.
    """
    if rule == "sum":
        return decoder_norms.sum(dim=1)
    if rule == "concat":
        return decoder_norms.norm(dim=1)
    return torch.ones_like(decoder_norms[:, 0])
