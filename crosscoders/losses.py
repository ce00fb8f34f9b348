r"""Loss terms: tensors in training space in, one number out. Definitions in docs/math.md, section "Training".

`reconstruction_loss`, `sparsity_loss` (ReLU crosscoders), `auxiliary_loss` (revives dead latents of BatchTopK).
"""

import torch
from jaxtyping import Bool, Float
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
    err: Float[Tensor, "batch n_models d_model"],
    positive: Float[Tensor, "batch dict_size"],
    code_norm: Float[Tensor, " dict_size"],
    W_dec: Float[Tensor, "dict_size n_models d_model"],
    dead: Bool[Tensor, " dict_size"],
    k_aux: int,
) -> Float[Tensor, ""]:
    r"""||err - err_hat||^2 / ||err - mean err||^2, sums over the batch, with err detached.

    err_hat decodes, without bias, the k_aux dead latents of largest ReLU(pre_j) c_j of each token. 0 when no latent is
    dead or the error does not vary. Source: Gao et al. 2024, section A.2, as in the published crosscoder trainer.
    """
    columns = dead.nonzero().squeeze(1)
    if not len(columns):
        return err.new_zeros(())
    err = err.detach().flatten(1)
    candidates = positive[:, columns]
    chosen = (candidates * code_norm[columns]).detach().topk(min(k_aux, len(columns)), dim=1, sorted=False).indices
    kept = torch.zeros_like(candidates).scatter(1, chosen, candidates.gather(1, chosen))
    err_hat = kept @ W_dec[columns].flatten(1)
    total = (err - err.mean(dim=0)).pow(2).sum()
    return (err - err_hat).pow(2).sum() / total if total > 0 else err.new_zeros(())
