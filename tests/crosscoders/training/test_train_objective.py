"""Loss terms on paper, and every one of them reaches the gradient."""

import numpy as np
import pytest
import torch
from training_runs import activations, config

from crosscoders import (
    Crosscoder,
    CrosscoderConfig,
)
from crosscoders.dictionary.losses import auxiliary_loss, reconstruction_loss
from crosscoders.dictionary.selection import WarmSelection
from crosscoders.training.objective import forward


def squares(err: torch.Tensor) -> torch.Tensor:
    return err.square().sum(dim=2)


def test_loss_terms_on_paper() -> None:
    err = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])
    assert float(reconstruction_loss(squares(err), "norm")) == (5 + 0 + 1 + 2) / 4
    assert float(reconstruction_loss(squares(err), "squared")) == (25 + 0 + 1 + 4) / 2


@pytest.mark.parametrize("kind", ["norm", "squared"])
def test_the_gradient_of_the_reconstruction_term_equals_autograd_and_is_zero_at_zero(kind: str) -> None:
    err = activations(5).double().requires_grad_()
    (ours,) = torch.autograd.grad(reconstruction_loss(squares(err), kind), err)
    plain = err.norm(dim=2).mean() if kind == "norm" else err.square().sum() / 5
    torch.testing.assert_close(ours, torch.autograd.grad(plain, err)[0])
    none = torch.zeros(2, 2, 3, requires_grad=True)
    assert not torch.autograd.grad(reconstruction_loss(squares(none), kind), none)[0].any()


def test_the_auxiliary_term_on_paper() -> None:
    err = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])  # mean (2, 0), so the total is 1 + 1
    err_hat = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])  # misses by 4 and 9
    assert float(auxiliary_loss(squares(err - err_hat), err)) == 13 / 2
    assert float(auxiliary_loss(torch.ones(3, 1), torch.ones(3, 1, 2))) == 0  # no variation to explain


@pytest.mark.parametrize("term", ["reconstruction", "sparsity", "auxiliary"])
def test_every_term_reaches_the_gradient(term: str) -> None:
    relu = term == "sparsity"
    shape = CrosscoderConfig(dict_size=12, d_model=6, activation="relu" if relu else "batchtopk", k=None if relu else 2)
    settings = config(crosscoder=shape, l1_coefficient=0.5 if relu else 0.0, aux_coefficient=0.0 if relu else 0.5)
    model = Crosscoder(shape)
    model.init_weights_(norm=0.5, generator=torch.Generator().manual_seed(0))
    result = forward(
        model,
        settings,
        activations(32),
        dead=torch.arange(12) > 5,
        k=None if relu else 2,
        step=0,
        select=WarmSelection(),
    )
    assert set(result.terms) == {"reconstruction", "sparsity" if relu else "auxiliary"}
    result.terms[term].backward()
    assert model.W_dec.grad is not None and model.W_dec.grad.abs().sum() > 0
    assert model.W_enc.grad is not None and model.W_enc.grad.abs().sum() > 0


def test_the_auxiliary_term_trains_dead_latents_only() -> None:
    shape = CrosscoderConfig(dict_size=12, d_model=6, k=2)
    model = Crosscoder(shape)
    model.init_weights_(norm=0.5, generator=torch.Generator().manual_seed(0))
    dead = torch.arange(12) > 5
    result = forward(model, config(crosscoder=shape), activations(32), dead=dead, k=2, step=0, select=WarmSelection())
    result.terms["auxiliary"].backward()
    assert model.W_dec.grad is not None
    assert (model.W_dec.grad[~dead] == 0).all() and (model.W_dec.grad[dead] != 0).any()


def test_the_gradient_equals_finite_differences() -> None:
    shape = CrosscoderConfig(dict_size=5, d_model=3, activation="relu")
    settings = config(crosscoder=shape, l1_coefficient=0.2)
    model = Crosscoder(shape).double()
    model.init_weights_(norm=0.7, generator=torch.Generator().manual_seed(1))
    x = activations(8, 3).double()

    def loss() -> torch.Tensor:
        terms = forward(
            model, settings, x, dead=torch.zeros(5, dtype=torch.bool), k=None, step=3, select=WarmSelection()
        ).terms
        return torch.stack(list(terms.values())).sum()

    loss().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        for flat in range(0, parameter.numel(), 4):
            place = tuple(int(i) for i in np.unravel_index(flat, parameter.shape))
            before = parameter.data[place].item()
            parameter.data[place] = before + 1e-6
            up = loss().item()
            parameter.data[place] = before - 1e-6
            slope = (up - loss().item()) / 2e-6
            parameter.data[place] = before
            assert abs(slope - parameter.grad[place].item()) < 1e-5
