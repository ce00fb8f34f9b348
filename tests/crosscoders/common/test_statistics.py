"""Intervals against other routes to the same numbers."""

import numpy as np
import pytest

from crosscoders.common.statistics import RESAMPLES, bootstrap_interval, resample, t_interval, wilson


def test_the_first_resample_is_the_data_and_every_one_has_as_many_units() -> None:
    weights = resample(7, 0)
    assert weights.shape == (RESAMPLES + 1, 7) and (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 7).all() and len(np.unique(weights[1:], axis=0)) > 500


def test_a_generator_goes_on_and_a_seed_starts_again() -> None:
    generator = np.random.default_rng(3)
    first, second = resample(5, generator), resample(5, generator)
    assert (first == resample(5, 3)).all() and (second != first).any()


def test_the_bootstrap_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_interval(resample(400, 0) @ values / 400)
    stderr = values.std() / 20
    assert (low - values.mean()) / stderr == pytest.approx(-1.96, abs=0.15)
    assert (high - values.mean()) / stderr == pytest.approx(1.96, abs=0.15)


def test_the_first_row_has_no_part_in_the_interval() -> None:
    assert bootstrap_interval(np.array([1e9, *np.linspace(0, 100, 101)])) == (2.5, 97.5)


def test_t_of_two_values_is_that_of_cauchy() -> None:
    # One degree of freedom: the 97.5% quantile is tan(pi (0.975 - 0.5)); 1 and 3 have mean 2 and stderr 1.
    half = np.tan(np.pi * 0.475)
    assert t_interval([1.0, 3.0]) == pytest.approx((2 - half, 2 + half))


def test_wilson_bounds_solve_the_quadratic_they_come_from() -> None:
    # |p - 3/8| = 1.959964 sqrt(p (1 - p) / 8)
    for p in wilson(3, 8):
        assert abs(p - 3 / 8) == pytest.approx(1.959964 * (p * (1 - p) / 8) ** 0.5)
