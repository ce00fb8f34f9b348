"""The objective of training: one forward pass over a batch, by variant, with its weighted loss terms.

`forward` chooses between the sparse path (BatchTopK, and ReLU once few latents are active) and the dense one; gradients
of both are closed forms in `sparse` and `dense`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.dictionary import dense, selection, sparse
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.dictionary.losses import auxiliary_loss, reconstruction_loss
from crosscoders.dictionary.norms import code_norm, differentiable_code_norm
from crosscoders.training.settings import TrainConfig

SPARSE_DENSITY = {"cpu": 0.1, "cuda": 0.0025}
"""Share of active latents up to which a ReLU step takes the sparse path, by device (see docs/performance.md)."""


class StepResult(NamedTuple):
    """What one forward pass gives."""

    terms: dict[str, Float[Tensor, ""]]
    """The terms of the loss, already weighted."""
    n_active: Int[Tensor, " dict_size"]
    """Tokens of the batch on which each latent is active."""
    err: Float[Tensor, "batch n_models d_model"]
    """x - x_hat, training space."""
    smallest_active: Float[Tensor, ""]
    """Smallest active f_j c_j of the batch, BatchTopK only."""


def forward(
    model: Crosscoder,
    config: TrainConfig,
    x: Float[Tensor, "batch n_models d_model"],
    *,
    dead: Bool[Tensor, " dict_size"],
    k: int | None,
    step: int,
    select: selection.WarmSelection,
    products: torch.dtype = torch.float32,
) -> StepResult:
    """Make one pass in training space: active latents, reconstruction, weighted loss terms.

    BatchTopK touches active entries only, forward and backward; its c_j decide the selection and carry no gradient.
    With bfloat16 products the selection is made from them, and the values of what is selected are float32.
    """
    norms = model.W_dec.detach().norm(dim=2)
    if config.crosscoder.activation == "relu":
        return _forward_relu(model, config, x, norms, step, products)
    assert k is not None
    with torch.no_grad():
        pre_acts, c = _pre_acts(model, x, products), code_norm(norms, config.crosscoder.code_norm)
    sets = [select(pre_acts, c, k * len(x))]
    if config.aux_coefficient and bool(dead.any()):
        # d_model // 2 takes the width of one model, not of all (Gao et al. 2024, B.1)
        k_aux = config.k_aux or x.shape[2] // 2
        sets.append(selection.largest_per_token(pre_acts, c, dead.nonzero().squeeze(1), k_aux))
    if products != torch.float32:
        sets = [sparse.refine(entries, model.W_enc, model.b_enc, x.flatten(1)) for entries in sets]
    _, flat_err, squares, *of_auxiliary = sparse.residuals(*_parameters(model), x.flatten(1), *sets)
    entries, err = sets[0], flat_err.view_as(x)
    terms = {"reconstruction": reconstruction_loss(squares, config.reconstruction)}
    if of_auxiliary:
        terms["auxiliary"] = config.aux_coefficient * auxiliary_loss(of_auxiliary[0], err)
    scaled = entries.values * c[entries.latents]
    smallest = scaled.min() if len(scaled) else scaled.new_tensor(torch.inf)
    fired = torch.bincount(entries.latents, minlength=len(dead))
    return StepResult(terms, fired, err, smallest)


def _forward_relu(
    model: Crosscoder,
    config: TrainConfig,
    x: Float[Tensor, "batch n_models d_model"],
    norms: Float[Tensor, "dict_size n_models"],
    step: int,
    products: torch.dtype,
) -> StepResult:
    """Go dense or sparse by the density of this batch, so that no step depends on the one before."""
    with torch.no_grad():
        latents = dense.relu_(_pre_acts(model, x, products))
    rule, fired = config.crosscoder.code_norm, latents.n_active
    if float(fired.sum()) <= SPARSE_DENSITY.get(x.device.type, 0.0) * latents.f.numel():
        entries = selection.active(latents.f, torch.zeros_like(model.b_enc))
        if products != torch.float32:
            entries = sparse.refine(entries, model.W_enc, model.b_enc, x.flatten(1))
        values, err, squares = sparse.residuals(*_parameters(model), x.flatten(1), entries)
        penalty = values @ differentiable_code_norm(model.W_dec, norms, rule)[entries.latents]
    else:
        inputs = *_parameters(model), x.flatten(1)
        err, squares, penalty = dense.residual(*inputs, latents, norms, rule, products)
    terms = {"reconstruction": reconstruction_loss(squares, config.reconstruction)}
    if config.l1_coefficient:
        weight = config.l1_coefficient * min(1.0, (step + 1) / max(1, config.l1_warmup_steps))
        terms["sparsity"] = weight * penalty / len(x)
    return StepResult(terms, fired.long(), err.view_as(x), x.new_tensor(torch.inf))


def _pre_acts(
    model: Crosscoder, x: Float[Tensor, "batch n_models d_model"], products: torch.dtype
) -> Float[Tensor, "batch dict_size"]:
    """Return x W_enc + b_enc, its product in the given type."""
    if products == torch.float32:
        return model.pre_acts(x)
    return dense.product(x.flatten(1), model.W_enc.flatten(0, 1), products).add_(model.b_enc)


def _parameters(model: Crosscoder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return model.W_enc, model.b_enc, model.W_dec, model.b_dec
