r"""ReLU crosscoders in five matrix products a step: reconstruction and L1 term with closed-form gradients.

The least that a step needs is two products forward, two for the decoder's and the latents' gradients and one for the
encoder's; autograd adds passes over (batch, dict_size) and (dict_size, n_models, d_model) tensors, which this avoids.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.dictionary.norms import code_norm, code_norm_factors


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"], dtype: torch.dtype) -> Tensor:
    """Return a b, computed in `dtype` where a is float32 (float64 stays as it is), in the type of a."""
    if _in_own_type(a, dtype):
        return a @ b
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _in_own_type(a: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or a.dtype != torch.float32


def _less_product_(
    goal: Float[Tensor, "rows columns"],
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """Take a b from `goal` in place, as `product` computes it."""
    if _in_own_type(a, dtype):
        return goal.addmm_(a, b, alpha=-1)
    return goal.sub_(product(a, b, dtype))


class Latents(NamedTuple):
    """Latents f = ReLU(x W_enc + b_enc) of a batch, with sums over its tokens."""

    f: Float[Tensor, "batch dict_size"]
    n_active: Float[Tensor, " dict_size"]
    """Tokens on which it is positive."""
    sums: Float[Tensor, " dict_size"]


def relu_(pre_acts: Float[Tensor, "batch dict_size"]) -> Latents:
    """Put to 0 what is negative, in place."""
    f = pre_acts.relu_()
    ones = f.new_ones(len(f))
    return Latents(f, ones @ f.sign(), ones @ f)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        latents: Latents,
        norms: Tensor,
        rule: str,
        products: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        err = _less_product_(x - b_dec.flatten(), latents.f, W_dec.flatten(1), products).view(len(x), *b_dec.shape)
        ctx.save_for_backward(W_dec, x, norms, err)
        ctx.latents, ctx.shape, ctx.rule, ctx.products = latents, W_enc.shape, rule, products
        ctx.mark_non_differentiable(err)
        return err, torch.linalg.vector_norm(err, dim=2).square_(), latents.sums @ code_norm(norms, rule)

    @staticmethod
    def backward(ctx: Any, _: Tensor, of_squares: Tensor, of_penalty: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec, x, norms, err), (f, _, sums) = ctx.saved_tensors, ctx.latents
        y = (err * (-2 * of_squares)[:, :, None]).flatten(1)  # dL / dx_hat
        pre_grad = product(y, W_dec.flatten(1).t(), ctx.products)
        pre_grad = torch.ops.aten.threshold_backward(pre_grad.add_(of_penalty * code_norm(norms, ctx.rule)), f, 0)
        W_enc_grad = product(pre_grad.t(), x, ctx.products)
        W_dec_grad = product(f.t(), y, ctx.products).view_as(W_dec)
        if ctx.rule != "none":
            W_dec_grad.addcmul_(W_dec, (of_penalty * sums[:, None] * code_norm_factors(norms, ctx.rule))[:, :, None])
        return (
            W_enc_grad.t().view(ctx.shape),
            f.new_ones(len(f)) @ pre_grad,
            W_dec_grad,
            y.sum(dim=0).view(W_dec.shape[1:]),
            *(None,) * 5,
        )


def residual(
    W_enc: Float[Tensor, "n_models d_model dict_size"],
    b_enc: Float[Tensor, " dict_size"],
    W_dec: Float[Tensor, "dict_size n_models d_model"],
    b_dec: Float[Tensor, "n_models d_model"],
    x: Float[Tensor, "batch width"],
    latents: Latents,
    norms: Float[Tensor, "dict_size n_models"],
    rule: str,
    products: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "batch n_models d_model"], Float[Tensor, "batch n_models"], Float[Tensor, ""]]:
    """Return err = x - (f W_dec + b_dec), without gradients, ||err_nm||^2, and the sum over tokens of sum_j f_j c_j.

    f = ReLU(x W_enc + b_enc). Gradients reach the parameters, through f and through c, whose decoder norms are given; x
    gets none.
    """
    return _Residual.apply(W_enc, b_enc, W_dec, b_dec, x, latents, norms, rule, products)
