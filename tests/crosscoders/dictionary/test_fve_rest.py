"""FVE on the tokens of ordinary norm, and what a dictionary that only knows the others is told."""

import pytest
import torch

from crosscoders.dictionary.health import complaints
from crosscoders.dictionary.metrics import Evaluation, ReconstructionSums
from crosscoders.training.log import eval_line, evaluation_rows

N = 3600
IS_SINK = torch.arange(N) % 36 == 0


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (N, 2, 8) and their reconstruction; one token in 36 is a sink, a hundred times as long, and rebuilt
    well; the others are rebuilt badly."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(N, 2, 8, generator=generator)
    x[IS_SINK] = 100 * x[IS_SINK].norm(dim=-1, keepdim=True) * torch.eye(8)[5]
    err = torch.randn(N, 2, 8, generator=generator) * 0.6
    return x, x - err


def evaluated(x: torch.Tensor, x_hat: torch.Tensor, batch_size: int) -> Evaluation:
    sums = ReconstructionSums(2, 8, 4)
    for a, b in zip(x.split(batch_size), x_hat.split(batch_size), strict=True):
        sums.add(a, b, torch.zeros(4, dtype=torch.int64))
    return sums.result()


def by_hand(x: torch.Tensor, x_hat: torch.Tensor) -> list[float]:
    x, x_hat = x.double(), x_hat.double()
    return (1 - (x - x_hat).square().sum(dim=(0, 2)) / (x - x.mean(dim=0)).square().sum(dim=(0, 2))).tolist()


def test_fve_rest_is_the_fve_of_the_tokens_that_are_no_sinks() -> None:
    x, x_hat = planted()
    found = evaluated(x, x_hat, 500)
    assert min(found.fve) > 0.99 and found.n_rest == [3500, 3500]
    assert found.fve_rest == pytest.approx(by_hand(x[~IS_SINK], x_hat[~IS_SINK]), rel=1e-9)
    assert max(found.fve_rest) < 0.7


def test_fve_rest_does_not_depend_on_batches_or_on_the_order_of_tokens() -> None:
    x, x_hat = planted()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    wanted = evaluated(x, x_hat, N).fve_rest
    for found in (evaluated(x, x_hat, 7), evaluated(x[order], x_hat[order], 100)):
        assert found.fve_rest == pytest.approx(wanted, rel=1e-12)


def test_fve_rest_is_fve_where_no_token_is_far_above_the_median() -> None:
    x, x_hat = planted()
    found = evaluated(x[~IS_SINK], x_hat[~IS_SINK], 100)
    assert found.fve_rest == pytest.approx(found.fve, rel=1e-9) and found.n_rest == [3500, 3500]


def test_the_border_lies_nine_quarter_octaves_above_the_median() -> None:
    # Norm 1 opens a quarter octave, 2^(10/4) = 5.657 the tenth above it: 5.65 is ordinary, 5.66 is not.
    for norm, n_rest in ((5.65, 10), (5.66, 9)):
        x = torch.ones(10, 1, 1)
        x[::2] = -1
        x[4] = norm
        sums = ReconstructionSums(1, 1, 4)
        sums.add(x, torch.zeros_like(x), torch.zeros(4, dtype=torch.int64))
        assert sums.result().n_rest == [n_rest]


def test_lines_and_rows_of_an_evaluation_name_both_figures() -> None:
    found = evaluated(*planted(), 500)
    line = eval_line(7, found)
    assert (line["fve_rest_base"], line["fve_rest_tuned"]) == tuple(found.fve_rest)
    rows = {row["name"]: row for row in evaluation_rows(found)}
    assert rows["eval.fve_rest.tuned"]["value"] == found.fve_rest[1] and rows["eval.fve_rest.tuned"]["n"] == 3500
    assert rows["eval.fve.tuned"]["n"] == 3600


def test_a_dictionary_of_sinks_is_complained_about() -> None:
    sinks = {"fve_base": 0.998, "fve_tuned": 0.998, "fve_rest_base": 0.62, "fve_rest_tuned": 0.63}
    (reason,) = complaints(sinks)
    assert "0.998 of the variance, but 0.62 on tokens of ordinary norm" in reason and "--max-norm-multiple" in reason
    assert complaints(sinks | {"fve_rest_base": 0.95, "fve_rest_tuned": 0.95}) == []
