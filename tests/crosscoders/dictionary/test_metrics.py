"""FVE, L0 and dead latents: definitions and invariances."""

import torch
from training_runs import activations

from crosscoders import (
    Crosscoder,
    CrosscoderConfig,
    evaluate,
)
from crosscoders.dictionary.metrics import ReconstructionSums


def fve(x: torch.Tensor, x_hat: torch.Tensor, split: int = 100) -> list[float]:
    sums = ReconstructionSums(x.shape[1], x.shape[2], 4)
    for a, b in zip(x.split(split), x_hat.split(split), strict=True):
        sums.add(a, b, torch.zeros(4, dtype=torch.int64))
    return sums.result().fve


def test_fve_on_paper() -> None:
    x = torch.tensor([[[1.0]], [[3.0]], [[5.0]]])  # mean 3, sum of squares about it 8
    assert fve(x, torch.tensor([[[1.0]], [[3.0]], [[3.0]]])) == [0.5]  # error 4


def test_fve_is_unchanged_when_data_is_rescaled_shifted_permuted_or_split() -> None:
    x = activations(300)
    x_hat = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    usual = torch.tensor(fve(x, x_hat))
    for changed in (fve(10 * x, 10 * x_hat), fve(x + 5, x_hat + 5), fve(x[order], x_hat[order]), fve(x, x_hat, 7)):
        torch.testing.assert_close(torch.tensor(changed), usual, rtol=1e-4, atol=1e-5)


def test_a_constant_error_lowers_fve_and_the_mean_as_prediction_gives_zero() -> None:
    x = activations(300)
    assert fve(x, x + 0.3)[0] < fve(x, x)[0] == 1.0
    assert abs(fve(x, x.mean(dim=0).expand_as(x))[0]) < 1e-5


def test_l0_and_dead_fraction_are_counts_over_the_whole_set() -> None:
    cc = Crosscoder(CrosscoderConfig(dict_size=4, d_model=6, activation="relu"))
    with torch.no_grad():
        cc.b_enc.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0]))
    found = evaluate(cc, activations(50).split(7))
    assert (found.l0, found.dead_fraction, found.n_tokens) == (3.0, 0.25, 50)
