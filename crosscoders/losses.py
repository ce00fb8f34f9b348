r"""Loss terms: tensors in training space in, one number out. Definitions in docs/math.md, section "Training".

`reconstruction_loss`, `sparsity_loss` (ReLU crosscoders), `auxiliary_loss` (revives dead latents of BatchTopK).
"""

from jaxtyping import Float
from torch import Tensor


def reconstruction_loss(err: Float[Tensor, "batch n_models d_model"], kind: str) -> Float[Tensor, ""]:
    r"""norm: mean over tokens and models of ||err||. squared: mean over tokens of sum_m ||err_m||^2.

    The published crosscoder code trains on the un-squared norm although its paper writes the square; coefficients of
    other terms do not carry over between the two.
    """
    if kind == "norm":
        return err.norm(dim=2).mean()
    return err.pow(2).sum(dim=(1, 2)).mean()


def sparsity_loss(
    latents: Float[Tensor, "batch dict_size"], code_norm: Float[Tensor, " dict_size"]
) -> Float[Tensor, ""]:
    r"""mean over tokens of sum_j f_j c_j; gradients reach the latents and, through c_j, the decoder norms."""
    return (latents @ code_norm).mean()


def auxiliary_loss(
    err: Float[Tensor, "batch n_models d_model"], err_hat: Float[Tensor, "batch n_models d_model"]
) -> Float[Tensor, ""]:
    r"""||err - err_hat||^2 / ||err - mean err||^2, sums over the batch, with err detached.

    err_hat decodes, without bias, the k_aux dead latents of largest ReLU(pre_j) c_j of each token. 0 when the error
    does not vary. Source: Gao et al. 2024, section A.2, as in the published crosscoder trainer.
    """
    err = err.detach()
    total = (err - err.mean(dim=0)).pow(2).sum()
    return (err - err_hat).pow(2).sum() / total if total > 0 else err_hat.sum() * 0
