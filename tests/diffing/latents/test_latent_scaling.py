"""Latent Scaling, norms and verdicts: properties, the slow reference, recorded values, planted truth."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import reference
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file
from small_crosscoders import PARITY, make, sample
from torch.utils._python_dispatch import TorchDispatchMode

from crosscoders import Crosscoder, CrosscoderConfig, InputError, load_crosscoder
from crosscoders.dictionary import sparse
from diffing import Thresholds, latent_table, scale_latents
from diffing.latents.decoder_norms import decoder_cosine, decoder_difference, norm_class
from diffing.latents.latent_scaling import TARGETS, ScalingSums
from diffing.latents.verdict import ranks, specificity, verdicts


@pytest.mark.parametrize("side", [1, 0])
@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_betas_equal_explicit_targets(activation: str, side: int) -> None:
    cc, x = make(activation), sample(60)
    f = cc.encode(x).double()
    fires = (f > 0).any(dim=0)
    assert int(fires.sum()) >= 2
    found, expected = scale_latents(cc, x.split(7)), reference.betas(cc, x, f, side=side)
    for name, column in expected.items():
        mine = found[name if side == 1 else f"{name}_mirror"]
        torch.testing.assert_close(mine[fires], column[fires], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["dictionary_learning_relu", "dictionary_learning_batchtopk", "dictionary_learning_batchtopk_saenorm"]
)
def test_betas_equal_those_recorded_from_the_published_code(name: str) -> None:
    cc, recorded = load_crosscoder(PARITY / name), load_file(PARITY / name / "expected.safetensors")
    found = scale_latents(cc, recorded["x"].split(100))
    assert torch.equal(found["n_active"], recorded["count_active"].long())
    fires = recorded["count_active"] > 0
    for model, ours in (("base", "base"), ("chat", "tuned")):
        for target in sorted(set(TARGETS) - {"reconstruction_no_bias"}):  # which the published code has not
            column = recorded[f"beta.{model}_{target}"]
            assert (found[f"beta_{ours}_{target}"][fires] - column[fires]).abs().max() < 1e-4, (model, target)


def test_the_order_and_size_of_batches_do_not_matter() -> None:
    cc, x = make(), sample(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    first, second = scale_latents(cc, x.split(5)), scale_latents(cc, x[order].split(60))
    for name in first:
        if "stderr" not in name:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_swapping_the_models_swaps_the_ratios_with_their_mirror_images() -> None:
    cc, x = make(), sample(60)
    other = make()
    for name in ("W_dec", "b_dec", "W_enc"):
        weight = getattr(cc, name)
        getattr(other, name).copy_(weight.flip(1 if name == "W_dec" else 0))
    other.input_scale.copy_(cc.input_scale.flip(0))
    other.input_mean.copy_(cc.input_mean.flip(0))
    first, second = scale_latents(cc, x.split(9)), scale_latents(other, x.flip(1).split(9))
    for target in TARGETS:
        torch.testing.assert_close(first[f"nu_{target}"], second[f"nu_{target}_mirror"], rtol=1e-3, atol=1e-5)


def test_folding_changes_no_ratio() -> None:
    cc, x = make(), sample(60)
    first, second = scale_latents(cc, x.split(9)), scale_latents(cc.fold(), x.split(9))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_the_ratios_of_two_equal_models_are_one() -> None:
    cc, x = make(), sample(60)
    with torch.no_grad():
        for name in ("W_dec", "b_dec"):
            weight = getattr(cc, name)
            weight.copy_(weight.select(1 if name == "W_dec" else 0, 0).unsqueeze(1 if name == "W_dec" else 0).clone())
        cc.input_scale.fill_(1.5), cc.input_mean.zero_()
    found = scale_latents(cc, x[:, :1].expand(-1, 2, -1).split(9))
    alive = found["n_active"] > 0
    for target in TARGETS:
        torch.testing.assert_close(
            found[f"nu_{target}"][alive], torch.ones(int(alive.sum())).double(), rtol=1e-4, atol=1e-4
        )


def test_a_latent_that_never_fires_is_finite_and_says_nothing() -> None:
    cc, x = make(), sample(60)
    cc.b_enc[4] = -1e6
    found = scale_latents(cc, x.split(9))
    assert int(found["n_active"][4]) == 0
    assert found["beta_base_error"][4] == 0 and found["nu_error"][4] == 1 and found["nu_error_stderr"][4] == torch.inf
    assert not any(values.isnan().any() for values in found.values())


def test_jackknife_errors_match_the_spread_over_independent_samples() -> None:
    # 40 independent samples of 1,024 tokens: the mean reported error must be near the true spread of the ratio.
    cc = make("relu")
    g = torch.Generator().manual_seed(5)
    values, errors = [], []
    for _ in range(40):
        found = scale_latents(cc, torch.randn(1024, 2, 3, generator=g).split(32))
        values.append(found["beta_base_activation"])
        errors.append(found["beta_base_activation_stderr"])
    ratio = torch.stack(errors).mean(dim=0) / torch.stack(values).std(dim=0)
    assert (ratio > 0.6).all() and (ratio < 1.5).all()  # 40 samples: the spread itself is known to 11%


def test_errors_do_not_shrink_where_neighbouring_batches_say_the_same() -> None:
    # Two batches of one document hold no more than one of them: left out together, they leave the errors as they are.
    cc, x = make("relu"), torch.randn(256, 2, 3, generator=torch.Generator().manual_seed(5))
    once = scale_latents(cc, x.split(8))
    twice = scale_latents(cc, [batch for batch in x.split(8) for _ in range(2)])
    assert once.n_blocks == twice.n_blocks == 32
    for name in once:
        if name.endswith("_stderr"):
            torch.testing.assert_close(once[name], twice[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "n_blocks, n_batches, expected", [(32, 40, 20), (32, 1000, 32), (5, 6, 3), (2, 9, 2), (8, 3, 3)]
)
def test_blocks_are_equal_runs_of_neighbours(n_blocks: int, n_batches: int, expected: int) -> None:
    # 40 batches in runs of 2; 1,000 of 32 (31.25); 6 of 2; 9 of 8; 3 of 1
    cc, x = make("relu"), torch.randn(n_batches * 4, 2, 3, generator=torch.Generator().manual_seed(5))
    sums, run = ScalingSums(cc, n_blocks), -(-n_batches // expected)
    for batch in x.split(4):
        sums.add(batch)
    assert sums.result().n_blocks == expected
    f = cc.encode(x).double()
    totals = torch.stack([part.sum(dim=0) for part in f.split(4 * sums.run)])
    assert sums.run >= run and len(totals) == expected
    torch.testing.assert_close(sums.f[:expected], totals)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    n = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.n = max(self.n, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_all_latents_times_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "PART_ENTRIES", 1024)
    cc = Crosscoder(CrosscoderConfig(dict_size=512, d_model=32, activation="relu")).requires_grad_(False)
    cc.init_weights_(norm=0.3, generator=torch.Generator().manual_seed(0))
    x, sums = torch.randn(80, 2, 32, generator=torch.Generator().manual_seed(1)), ScalingSums(cc)
    whole = scale_latents(cc, x.split(16))
    with Largest() as largest:
        for batch in x.split(16):
            sums.add(batch)
    decoder = 512 * 2 * 32
    assert largest.n <= decoder  # a view of the weights; f^T y for all latents has twice as many numbers
    assert torch.equal(sums.result()["nu_error"], whole["nu_error"])


def planted(gain: float, *, n: int = 6000) -> tuple[Crosscoder, torch.Tensor]:
    """Three known concepts with a crosscoder whose base decoder of latent 1 is shrunk to 0, as L1 training does.

    0: shared. 1: present in base with `gain`, but the crosscoder has no base decoder for it. 2: truly tuned-only.
    """
    g = torch.Generator().manual_seed(0)
    f = torch.rand(n, 3, generator=g) * (torch.rand(n, 3, generator=g) < 0.3)
    base, tuned = torch.zeros(3, 5), torch.zeros(3, 5)
    tuned[0, 0] = tuned[1, 1] = tuned[2, 2] = base[0, 0] = 1.0
    base[1, 1] = gain
    cc = Crosscoder(CrosscoderConfig(dict_size=3, d_model=5, activation="relu"))
    with torch.no_grad():
        cc.W_dec.copy_(torch.stack([base, tuned], dim=1))
        cc.W_dec[1, 0] = 0
        cc.W_enc[1, :3] = torch.eye(3)
    noise = 0.01 * torch.randn(n, 2, 5, generator=g)
    return cc.requires_grad_(False), torch.einsum("nj,jmd->nmd", f, torch.stack([base, tuned], dim=1)) + noise


@pytest.mark.parametrize("gain", [0.3, 0.6])
def test_complete_shrinkage_is_exposed_and_the_planted_gain_recovered(gain: float) -> None:
    cc, x = planted(gain)
    found = scale_latents(cc, x.split(200))
    assert abs(float(found["nu_error"][1]) - gain) < 0.03
    assert abs(float(found["nu_error"][2])) < 0.03
    table = latent_table(cc, found)
    assert table["norm_class"].tolist() == ["shared", "tuned-only", "tuned-only"]
    assert table["verdict"].tolist() == ["shared", "shrunk", "tuned-specific"]


def test_latent_decoupling_is_exposed_by_the_reconstruction_ratio() -> None:
    # A shared concept carried by a base-only and a tuned-only twin of one direction.
    g = torch.Generator().manual_seed(0)
    f = torch.rand(6000, 1, generator=g) * (torch.rand(6000, 1, generator=g) < 0.3)
    x = torch.zeros(6000, 2, 5)
    x[:, :, 1] = f
    cc = Crosscoder(CrosscoderConfig(dict_size=2, d_model=5, activation="relu"))
    with torch.no_grad():
        cc.W_dec[0, 1, 1] = cc.W_dec[1, 0, 1] = 1.0
        cc.W_enc[1, 1, 0] = cc.W_enc[0, 1, 1] = 1.0
    found = scale_latents(cc.requires_grad_(False), (x + 0.01 * torch.randn(x.shape, generator=g)).split(200))
    table = latent_table(cc, found)
    assert table["norm_class"].tolist() == ["tuned-only", "base-only"]
    assert float(found["nu_error"][0]) < 0.1 < 0.9 < float(found["nu_reconstruction"][0])
    assert table["verdict"].tolist() == ["decoupled", "decoupled"]


def row(**values: float | str) -> pandas.DataFrame:
    """One latent that is clearly tuned-specific, with changes."""
    usual: dict[str, float | str] = {
        "n_active": 1000, "relative_decoder_norm": 0.95, "decoder_cosine": 0.0,
        "nu_error": 0.05, "nu_error_stderr": 0.01, "nu_reconstruction": 0.1, "nu_reconstruction_stderr": 0.01,
        "nu_error_mirror": 0.05, "nu_error_mirror_stderr": 0.01,
        "nu_reconstruction_mirror": 0.1, "nu_reconstruction_mirror_stderr": 0.01,
    }  # fmt: skip
    return pandas.DataFrame([{**usual, **values}])


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({}, "tuned-specific"),
        ({"n_active": 0}, "dead"),
        ({"n_active": 29}, "undetermined"),
        ({"nu_error": 0.4}, "shrunk"),
        ({"nu_reconstruction": 0.8}, "decoupled"),
        ({"nu_error": 0.19}, "undetermined"),
        ({"nu_error_stderr": float("inf")}, "undetermined"),
        ({"relative_decoder_norm": 0.05}, "base-specific"),
        ({"relative_decoder_norm": 0.05, "nu_error_mirror": 0.4}, "shrunk"),
        # low ratios count for nothing when both norms are alive: only the cosine does
        ({"relative_decoder_norm": 0.6, "decoder_cosine": 0.1}, "rotated"),
        ({"relative_decoder_norm": 0.6, "decoder_cosine": 0.9}, "shared"),
        # a rotated latent that leans to a side is judged by its ratios, and stays rotated where they are not small
        ({"relative_decoder_norm": 0.7, "decoder_cosine": 0.1}, "tuned-leaning"),
        ({"relative_decoder_norm": 0.7, "decoder_cosine": 0.1, "nu_error": 0.4}, "rotated"),
        ({"relative_decoder_norm": 0.7, "decoder_cosine": 0.1, "nu_reconstruction": 0.49}, "rotated"),
        ({"relative_decoder_norm": 0.7, "decoder_cosine": 0.6}, "shared"),
        ({"relative_decoder_norm": 0.3, "decoder_cosine": 0.1}, "base-leaning"),
        ({"relative_decoder_norm": 0.3, "decoder_cosine": 0.1, "nu_error_mirror": 0.4}, "rotated"),
    ],
)
def test_verdicts_on_paper(changes: dict[str, float], verdict: str) -> None:
    assert verdicts(row(**changes)) == [verdict]


@pytest.mark.parametrize(
    "norm, role, cosine, verdict",
    [
        # what leans is told by whose direction its weak decoder has
        (0.8, "parent", 0.95, "tuned-specific"),
        (0.8, "part", 0.95, "split"),
        (0.8, "copy", 0.95, "rotated"),
        (0.2, "parent", 0.95, "base-specific"),
        (0.2, "part", 0.95, "split"),
        # and a latent that is tuned-only by norm is believed but where it is a part or a copy
        (0.95, "parent", 0.95, "tuned-specific"),
        (0.95, "part", 0.95, "split"),
        (0.95, "copy", 0.95, "rotated"),
        (0.5, "part", 0.95, "split"),
        (0.5, "copy", 0.95, "rotated"),
        # another direction is nobody's
        (0.8, "parent", 0.85, "tuned-leaning"),
        (0.8, "part", 0.85, "tuned-leaning"),
        (0.95, "part", 0.85, "tuned-specific"),
        (0.5, "part", 0.85, "rotated"),
        (0.8, None, float("nan"), "tuned-leaning"),
    ],
)
def test_verdicts_with_a_sibling_on_paper(norm: float, role: str | None, cosine: float, verdict: str) -> None:
    table = row(relative_decoder_norm=norm).assign(sibling_role=[role], sibling_cosine=cosine)
    assert verdicts(table) == [verdict]


def test_ranks_put_latents_that_are_dead_or_stronger_in_base_last() -> None:
    table = pandas.concat(
        [row(decoder_cosine=0.9), row(n_active=3), row(decoder_cosine=-0.5), row(relative_decoder_norm=0.3), row()],
        ignore_index=True,
    )
    assert ranks(table).tolist()[:1] + ranks(table).tolist()[2:3] + ranks(table).tolist()[4:] == [3, 1, 2]
    assert set(ranks(table)[[1, 3]]) == {4, 5}
    assert np.allclose(specificity(row(nu_reconstruction=0.4, decoder_cosine=0.5)), 0.6 * 0.25)


def test_a_rank_goes_by_verdict_before_specificity() -> None:
    weak = {"decoder_cosine": 0.9, "nu_reconstruction": 0.3}  # a low specificity, behind the gate by its norm
    strong = {"decoder_cosine": -0.9, "nu_reconstruction": 0.0}
    table = pandas.concat(
        [
            row(**strong, relative_decoder_norm=0.6),  # rotated
            row(**weak),  # tuned-specific
            row(**strong, partner_correlation=0.8),  # decoupled, as specific as the first
            row(**weak, nu_error=0.4),  # shrunk
            row(relative_decoder_norm=0.6, decoder_cosine=0.6),  # shared
            row(decoder_cosine=-1.0, nu_error=0.19),  # undetermined
            row(decoder_cosine=-0.5),  # tuned-specific
        ],
        ignore_index=True,
    )
    assert ranks(table).tolist() == [4, 2, 5, 6, 7, 3, 1]


def test_norm_classes_and_cosines_on_paper() -> None:
    assert norm_class([0.0, 0.1, 0.3, 0.4, 0.6, 0.75, 0.9, 1.0]) == [
        "base-only", "base-only", "other", "shared", "shared", "other", "tuned-only", "tuned-only",
    ]  # fmt: skip
    cc = make()
    cc.W_dec.zero_()
    cc.W_dec[0, :, 0] = 2.0
    cc.W_dec[1, 0, 0], cc.W_dec[1, 1, 1] = 1.0, 1.0
    cc.W_dec[2, 0, 0], cc.W_dec[2, 1, 0] = 1.0, -3.0
    assert decoder_cosine(cc)[:4].tolist() == [1.0, 0.0, -1.0, 0.0]


def test_a_decoder_difference_is_in_the_units_of_x_folded_or_not() -> None:
    cc = make()
    cc.W_dec.zero_()
    cc.input_scale.copy_(torch.tensor([2.0, 0.5]))
    cc.W_dec[0, :, 0] = torch.tensor([4.0, 1.0])  # 2 in both models in the units of x
    cc.W_dec[1, 0, 0], cc.W_dec[1, 1, 1] = 6.0, 2.0  # 3 along one axis, 4 along another
    for known in (cc, cc.fold()):
        assert decoder_difference(known)[:3].tolist() == [0.0, 5.0, 0.0]


def test_thresholds_are_the_published_ones_and_ours() -> None:
    assert Thresholds() == Thresholds(0.2, 0.5, 0.9, 0.1, 0.5, 30, 0.7, 0.3)


def test_one_model_or_no_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compares two models; this crosscoder has 1"):
        scale_latents(make(n_models=1), [])
    with pytest.raises(InputError, match="no tokens to scale latents on"):
        scale_latents(make(), [])


def test_a_ratio_far_below_zero_is_no_evidence() -> None:
    assert verdicts(row(nu_reconstruction=-4.7, nu_reconstruction_stderr=0.1)) == ["decoupled"]
    assert specificity(row(nu_reconstruction=-4.7))[0] == 0.0


def test_latents_with_zero_decoders_are_gated_alike_in_encode_and_scaling() -> None:
    for threshold in (-1.0, 0.0, 1.5):
        cc, x = make(), sample(60)
        cc.W_dec[3] = 0
        cc.threshold.fill_(threshold)
        counted = (cc.encode(x) > 0).sum(dim=0)
        assert torch.equal(scale_latents(cc, x.split(9))["n_active"], counted), threshold
