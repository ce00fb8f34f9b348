r"""Loss terms: tensors in training space in, one number out. Definitions in docs/math.md, section "Training".

`reconstruction_loss`, `differentiable_code_norm` (the L1 term of ReLU crosscoders is mean_n sum_j f_nj c_j),
`auxiliary_loss` (revives dead latents of BatchTopK).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def reconstruction_loss(squares: Float[Tensor, "batch n_models"], kind: str) -> Float[Tensor, ""]:
    r"""Return the reconstruction term from ||err_nm||^2.

    norm: mean over tokens and models of ||err||. squared: mean over tokens of sum_m ||err_m||^2.

    The published crosscoder code trains on the un-squared norm although its paper writes the square; coefficients of
    other terms do not carry over between the two. Where err is 0, its norm has the gradient 0.
    """
    if kind == "norm":
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().mean()
    return squares.sum(dim=1).mean()


def auxiliary_loss(
    squares: Float[Tensor, "batch n_models"], err: Float[Tensor, "batch n_models d_model"]
) -> Float[Tensor, ""]:
    r"""Return ||err - err_hat||^2 / ||err - mean err||^2, sums over the batch, from the squared norms above the line.

    err is a constant; err_hat decodes, without bias, the k_aux dead latents of largest ReLU(pre_j) c_j of each
    token. The term is 0 when the error does not vary. Source: Gao et al. 2024, section A.2, as in the published
    crosscoder trainer.
    """
    varying = (err - err.mean(dim=0)).flatten()
    total = torch.dot(varying, varying)
    return squares.sum() / total if total > 0 else squares.sum() * 0
