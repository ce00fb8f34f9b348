r"""ReLU crosscoders in five matrix products a step: reconstruction and L1 term with closed-form gradients.

The least that a step needs is two products forward, two for the decoder's and the latents' gradients and one for the
encoder's; autograd adds passes over (batch, dict_size) and (dict_size, n_models, d_model) tensors, which this avoids.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.dictionary.norms import code_norm, code_norm_factors
from crosscoders.kernels import cpu
from crosscoders.kernels.library import usable, usable_rows


def product(
    a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"], dtype: torch.dtype, spaced: bool = False
) -> Tensor:
    """a b, computed in `dtype` where a is float32 (float64 stays as it is), given in the type of a.

    spaced: with its rows further apart where the compiled kernels run, for a later product that reads its columns.
    """
    if _in_own_type(a, dtype):
        return torch.mm(a, b, out=cpu.spaced(len(a), b.shape[1]) if spaced and usable(a) else None)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _in_own_type(a: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or a.dtype != torch.float32


def _less_product_(
    goal: Float[Tensor, "rows columns"],
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """goal - a b in place, as `product` computes it."""
    if _in_own_type(a, dtype):
        return goal.addmm_(a, b, alpha=-1)
    return goal.sub_(product(a, b, dtype))


class Latents(NamedTuple):
    """f = ReLU(x W_enc + b_enc) of a batch, with sums over its tokens."""

    f: Float[Tensor, "batch dict_size"]
    n_active: Float[Tensor, " dict_size"]
    """Tokens on which it is positive."""
    sums: Float[Tensor, " dict_size"]


def relu_(products: Float[Tensor, "batch dict_size"], bias: Float[Tensor, " dict_size"] | None = None) -> Latents:
    """ReLU(products + bias), in place."""
    if usable_rows(products):
        return Latents(
            products, *cpu.relu_count_(products, products.new_zeros(products.shape[1]) if bias is None else bias)
        )
    f = (products if bias is None else products.add_(bias)).relu_()
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
        squares: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        err = _less_product_(x - b_dec.flatten(), latents.f, W_dec.flatten(1), products).view(len(x), *b_dec.shape)
        ctx.save_for_backward(W_dec, x, norms, err)
        ctx.latents, ctx.shape, ctx.rule, ctx.products, ctx.squares = latents, W_enc.shape, rule, products, squares
        ctx.mark_non_differentiable(err)
        return err, torch.linalg.vector_norm(err, dim=2).square_(), latents.sums @ code_norm(norms, rule)

    @staticmethod
    def backward(ctx: Any, _: Tensor, of_squares: Tensor, of_penalty: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec, x, norms, err), (f, _, sums) = ctx.saved_tensors, ctx.latents
        y = (err * (-2 * of_squares)[:, :, None]).flatten(1)  # dL / dx_hat
        pre_grad = product(y, W_dec.flatten(1).t(), ctx.products, spaced=True)
        penalty = of_penalty * code_norm(norms, ctx.rule)
        if usable_rows(pre_grad) and f.stride() == pre_grad.stride():
            b_enc_grad = cpu.relu_backward_(pre_grad, f, penalty)
        else:
            pre_grad = torch.ops.aten.threshold_backward(pre_grad.add_(penalty), f, 0)
            b_enc_grad = f.new_ones(len(f)) @ pre_grad
        W_enc_grad = product(pre_grad.t(), x, ctx.products)
        W_dec_grad = product(f.t(), y, ctx.products).view_as(W_dec)
        factors = of_penalty * sums[:, None] * code_norm_factors(norms, ctx.rule)
        if usable(W_dec_grad, W_enc_grad, W_dec):
            of_rows = cpu.add_rows_(W_dec_grad.flatten(0, 1), factors.flatten(), W_dec.flatten(0, 1))
            ctx.squares.append(of_rows.sum(dtype=torch.float64) + cpu.sum_squares(W_enc_grad))
        elif ctx.rule != "none":
            W_dec_grad.addcmul_(W_dec, factors[:, :, None])
        return (
            W_enc_grad.t().view(ctx.shape),
            b_enc_grad,
            W_dec_grad,
            y.sum(dim=0).view(W_dec.shape[1:]),
            *(None,) * 6,
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
    squares: list[Tensor] | None = None,
) -> tuple[Float[Tensor, "batch n_models d_model"], Float[Tensor, "batch n_models"], Float[Tensor, ""]]:
    """err = x - (f W_dec + b_dec), without gradients, ||err_nm||^2, and the sum over tokens of sum_j f_j c_j.

    f = ReLU(x W_enc + b_enc). Gradients reach the parameters, through f and through c, whose decoder norms are given; x
    gets none. Where the compiled kernels run, the backward pass appends to `squares` the sum of the squares of the
    gradients that it gives W_enc and W_dec.
    """
    known = latents, norms, rule, products, [] if squares is None else squares
    return _Residual.apply(W_enc, b_enc, W_dec, b_dec, x, *known)
