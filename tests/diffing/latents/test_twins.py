"""Twins: planted Complete Shrinkage and Latent Decoupling are told apart, the twin is named, divergence by hand."""

import json
from pathlib import Path

import pandas
import pytest
import torch
from torch import Tensor

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig
from diffing import scale_latents
from diffing.latents.table import latent_table, read_table, scale_run
from diffing.latents.twins import Pairs, add_twins, divergence, false_pairs, twin_pairs


def planted(together: float, n: int = 6000) -> tuple[Crosscoder, Tensor]:
    """Five concepts on axes 0 to 4. 0: shared. 1: in both models, split by the crosscoder into latents 1 (tuned-only)
    and 5 (base-only), Latent Decoupling. 2: in both, base decoder shrunk to 0, Complete Shrinkage. 3: truly tuned-only.
    4: base-only, along another axis. `together`: chance that latent 5's copy of concept 1 comes with that of latent 1.
    """
    g = torch.Generator().manual_seed(0)
    fires = torch.rand(n, 6, generator=g) < 0.3
    fires[:, 5] = torch.where(torch.rand(n, generator=g) < together, fires[:, 1], ~fires[:, 1] & fires[:, 5])
    f = (0.5 + torch.rand(n, 6, generator=g)) * fires
    f[:, 5] = torch.where(fires[:, 5] & fires[:, 1], f[:, 1], f[:, 5])
    axis = torch.eye(7)
    base = torch.stack([axis[0], 0 * axis[1], 0.8 * axis[2], 0 * axis[3], axis[4], axis[1]])
    tuned = torch.stack([axis[0], axis[1], axis[2], axis[3], 0 * axis[4], 0 * axis[1]])
    cc = Crosscoder(CrosscoderConfig(dict_size=6, d_model=7, activation="relu")).requires_grad_(False)
    cc.W_dec.copy_(torch.stack([base, tuned], dim=1))
    cc.W_dec[2, 0] = 0
    cc.W_enc[1, :, :4], cc.W_enc[0, :, 4:] = axis[:, :4], axis[:, [4, 1]]
    cc.b_enc.fill_(-0.1)
    x = torch.einsum("nj,jmd->nmd", f, torch.stack([base, tuned], dim=1))
    return cc, x + 0.01 * torch.randn(n, 2, 7, generator=g)


def table_of(cc: Crosscoder, x: Tensor) -> pandas.DataFrame:
    return latent_table(cc, scale_latents(cc, x.split(200)))


def test_shrinkage_and_decoupling_are_told_apart_and_the_twin_is_named() -> None:
    cc, x = planted(together=1.0)
    table = table_of(cc, x)
    pairs = twin_pairs(cc, table)
    assert [side.tolist() for side in pairs[:2]] == [[1], [5]] and float(pairs.cosine[0]) == pytest.approx(1.0)
    table = add_twins(table, pairs, divergence(cc, table, pairs, x.split(500)))
    assert table["verdict"].tolist() == [
        "shared", "decoupled", "shrunk", "tuned-specific", "base-specific", "decoupled",
    ]  # fmt: skip
    assert table["twin"].tolist() == [pandas.NA, 5, pandas.NA, pandas.NA, pandas.NA, 1]
    assert table["twin_divergence"][1] == table["twin_divergence"][5] < 0.02


def test_one_direction_in_different_contexts_is_a_twin_of_high_divergence() -> None:
    cc, x = planted(together=0.0)
    table = table_of(cc, x)
    pairs = twin_pairs(cc, table)
    assert len(pairs.tuned) == 1 and float(divergence(cc, table, pairs, x.split(500))[0]) > 0.98


def test_the_control_has_low_cosine_and_diverges() -> None:
    cc, x = planted(together=1.0)
    table = table_of(cc, x)
    control = false_pairs(cc, table, twin_pairs(cc, table))
    assert control.tuned.tolist() == [1] and control.base.tolist() == [4] and float(control.cosine[0]) < 0.5
    # Both fire on 30% of tokens, independently: of the 51% with one of them strong, 42% have one alone.
    assert float(divergence(cc, table, control, x.split(500))[0]) == pytest.approx(0.42 / 0.51, abs=0.05)


def test_divergence_of_a_worked_example_and_not_of_the_units_of_a_latent() -> None:
    cc = Crosscoder(CrosscoderConfig(dict_size=2, d_model=2, activation="relu")).requires_grad_(False)
    cc.W_dec[0, 1], cc.W_dec[1, 0] = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0])
    cc.W_enc[1, 0, 0] = cc.W_enc[0, 0, 1] = 1.0
    # strengths: f_0 * 1 and f_1 * 0.5, largest 10; tuned, base columns of x
    tuned, base = torch.tensor([10.0, 5.0, 5.0, 0.5, 2.0, 0.0]), torch.tensor([20.0, 0.0, 2.0, 10.0, 8.0, 0.0])
    x = torch.zeros(6, 2, 2)
    x[:, 1, 0], x[:, 0, 0] = tuned, base
    # relative: (1, 1) both high; (.5, 0) apart; (.5, .1) apart; (.05, .5) apart; (.2, .4) no high; (0, 0) none
    table = pandas.DataFrame({"max_activation": [10.0, 20.0]})
    pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]))
    assert float(divergence(cc, table, pairs, [x])[0]) == 0.75
    cc.W_enc[:, :, 1] *= 4  # the same latent in other units
    cc.W_dec[1] /= 4
    assert float(divergence(cc, table.assign(max_activation=[10.0, 80.0]), pairs, [x])[0]) == 0.75


def test_latents_of_one_class_or_dead_ones_have_no_twins() -> None:
    cc, x = planted(together=1.0)
    table = table_of(cc, x)
    assert not len(twin_pairs(cc, table.assign(n_active=5)).tuned)
    assert not len(twin_pairs(cc, table.assign(relative_decoder_norm=0.95)).tuned)
    none = add_twins(table, twin_pairs(cc, table.assign(n_active=5)), torch.zeros(0).double())
    assert none["twin"].isna().all() and none["twin_divergence"].isna().all()


def test_the_table_and_twins_json_of_a_run_name_the_twins(cache_folder: Path, tmp_path: Path) -> None:
    cache = ActivationCache(cache_folder)
    cc = Crosscoder(CrosscoderConfig(dict_size=8, activation="relu", d_model=cache.d_model)).requires_grad_(False)
    cc.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    cc.W_dec[0, 0], cc.W_dec[1, 1], cc.W_dec[2, 0] = 0, 0, 0
    cc.W_dec[1, 0] = cc.W_dec[0, 1]  # latents 0 and 1 are twins; latent 2 is tuned-only without one
    cc.W_enc[:, :, 1] = cc.W_enc[:, :, 0]
    cc.save(tmp_path)
    scale_run(tmp_path, cache)
    table = read_table(tmp_path)
    assert table["twin"].tolist()[:2] == [1, 0] and table["twin"].isna().sum() == 6
    listed = json.loads((tmp_path / "twins.json").read_text())
    assert [(pair["tuned"], pair["base"], pair["divergence"]) for pair in listed["twins"]] == [(0, 1, 0.0)]
    columns = json.loads((tmp_path / "latents.json").read_text())["columns"]
    assert columns["twin"][:3] == [1, 0, None] and columns["twin_cosine"][2] is None
