"""Sets of latents to patch: orders, halves, random draws, and sets that cannot be."""

from typing import Any

import numpy as np
import pandas
import pytest

from crosscoders import InputError
from diffing.causal.sets import choose_sets, orders, random_sets


def table_of(**columns: list[float]) -> pandas.DataFrame:
    n = len(columns["n_active"])
    ratios = {f"nu_{kind}{side}": [0.0] * n for kind in ("error", "reconstruction") for side in ("", "_mirror")}
    return pandas.DataFrame({**ratios, "relative_decoder_norm": [0.5] * n, "decoder_cosine": [0.0] * n, **columns})


def test_orders_are_those_of_a_worked_example_and_mirror_when_the_models_swap() -> None:
    table = table_of(
        n_active=[99, 99, 99, 99, 10],
        relative_decoder_norm=[0.6, 0.9, 0.4, 0.7, 1.0],
        # ranks by |.|: 0 -> 2, 1 -> 4, 2 -> 1, 3 -> 3
        nu_error=[-0.2, 0.9, 0.1, 0.3, 0.0],
        # ranks: 0 -> 2, 1 -> 1, 2 -> 3, 3 -> 4
        nu_reconstruction=[0.2, 0.1, 0.3, -0.9, 0.0],
    )
    table["decoder_cosine"] = [0.4, 0.9, -0.5, 0.4, -1.0]
    difference = np.array([0.3, 0.1, 0.2, 0.8, 9.0])
    found = orders(table, 1, difference)
    assert found["scaling"].tolist() == [0, 1, 3, 2]  # sums 4, 5, 7; latent 2 (sum 4) leans to the base model
    assert found["norm"].tolist() == [1, 3, 0, 2]  # latent 4 is not alive
    assert found["difference"].tolist() == [3, 0, 2, 1]
    assert found["cosine"].tolist() == [2, 0, 3, 1]
    swapped = table.rename(columns=lambda name: name.removesuffix("_mirror") if "mirror" in name else
                           f"{name}_mirror" if name.startswith("nu_") else name)  # fmt: skip
    swapped["relative_decoder_norm"] = 1 - swapped["relative_decoder_norm"]
    for score, order in orders(swapped, 0, difference).items():
        assert order.tolist() == found[score].tolist()


def test_halves_are_those_of_the_latents_that_lean_to_the_target() -> None:
    norm = [0.9, 0.8, 0.7, 0.6, 0.3, 0.2]
    table = table_of(n_active=[99.0] * 6, relative_decoder_norm=norm, nu_error=[0.9, 0.1, 0.8, 0.2, 0.0, 0.0])
    sets = {s.name: set(s.latents) for s in choose_sets(table, 1, np.zeros(6), n_latents=[1], draws=1, seed=0)}
    assert sets["best_half.norm"] == {0, 1} and sets["worst_half.norm"] == {2, 3}
    assert sets["best_half.scaling"] == {1, 3} and sets["worst_half.scaling"] == {0, 2}


def test_random_sets_are_alive_distinct_seeded_and_as_frequent_as_asked() -> None:
    table = table_of(n_active=[float(n) for n in range(200)])
    drawn = random_sets(table, 20, draws=5, seed=0)
    assert drawn == random_sets(table, 20, draws=5, seed=0) != random_sets(table, 20, draws=5, seed=1)
    assert all(len(set(chosen)) == 20 and min(chosen) >= 30 for chosen in drawn)
    like = np.arange(190, 200)  # all from the most frequent tenth of the alive ones, 183 to 199
    for chosen in random_sets(table, 10, draws=5, seed=0, like=like):
        assert len(set(chosen)) == 10 and min(chosen) >= 183


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"latents": []}, "latents is an empty list"),
        ({"latents": [3, 24]}, "there is no latent 24: this crosscoder has latents 0 to 23"),
        ({"latents": [-1]}, "there is no latent -1"),
        ({"latents": [3, 3]}, "names one of them twice"),
        ({"n_latents": [0]}, "n_latents is 0; give a number from 1 to 24, the alive latents"),
        ({"n_latents": [4, 25]}, "n_latents is 25"),
    ],
)
def test_sets_that_cannot_be_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        choose_sets(
            table_of(n_active=[99.0] * 24), 1, np.zeros(24), **{"n_latents": [4], "draws": 2, "seed": 0, **settings}
        )
