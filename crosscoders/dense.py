r"""ReLU crosscoders in five matrix products a step: reconstruction and L1 term with closed-form gradients.

The least that a step needs is two products forward, two for the decoder's and the latents' gradients and one for the
encoder's; autograd adds passes over (batch, dict_size) and (dict_size, n_models, d_model) tensors, which this avoids.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.kernels import cpu


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"], dtype: torch.dtype) -> Tensor:
    """a b, computed in `dtype` where a is float32 (float64 stays as it is), given in the type of a."""
    if dtype == torch.float32 or a.dtype != torch.float32:
        return a @ b
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        f: Tensor,
        c: Tensor,
        products: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(W_dec, x, f, c)
        ctx.shape, ctx.products = W_enc.shape, products
        return product(f, W_dec.flatten(1), products).add_(b_dec.flatten()), (f @ c).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, x, f, c = ctx.saved_tensors
        y = grads[0].contiguous()
        pre_grad = product(y, W_dec.flatten(1).t(), ctx.products)
        penalty, ones = grads[1] * c, f.new_ones(len(f))
        if cpu.usable(pre_grad, f, penalty):
            b_enc_grad = cpu.relu_backward_(pre_grad, f, penalty)
        else:
            pre_grad = torch.ops.aten.threshold_backward(pre_grad.add_(penalty), f, 0)
            b_enc_grad = ones @ pre_grad
        return (
            product(pre_grad.t(), x, ctx.products).t().view(ctx.shape),
            b_enc_grad,
            product(f.t(), y, ctx.products).view_as(W_dec),
            y.sum(dim=0).view(W_dec.shape[1:]),
            None,
            None,
            grads[1] * (ones @ f),
            None,
        )


def relu_(
    products: Float[Tensor, "batch dict_size"], bias: Float[Tensor, " dict_size"] | None = None
) -> tuple[Float[Tensor, "batch dict_size"], Float[Tensor, " dict_size"]]:
    """ReLU(products + bias) in place, and the number of tokens on which each latent is positive."""
    if cpu.usable(products):
        return products, cpu.relu_count_(products, products.new_zeros(products.shape[1]) if bias is None else bias)
    latents = (products if bias is None else products.add_(bias)).relu_()
    return latents, latents.new_ones(len(latents)) @ latents.sign()


def reconstruct(
    W_enc: Float[Tensor, "n_models d_model dict_size"],
    b_enc: Float[Tensor, " dict_size"],
    W_dec: Float[Tensor, "dict_size n_models d_model"],
    b_dec: Float[Tensor, "n_models d_model"],
    x: Float[Tensor, "batch width"],
    f: Float[Tensor, "batch dict_size"],
    c: Float[Tensor, " dict_size"],
    products: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "batch width"], Float[Tensor, ""]]:
    """f W_dec + b_dec and the sum over tokens of sum_j f_j c_j, for f = ReLU(x W_enc + b_enc).

    Gradients reach the parameters through f, and c; x gets none.
    """
    return _Reconstruct.apply(W_enc, b_enc, W_dec, b_dec, x, f, c, products)
