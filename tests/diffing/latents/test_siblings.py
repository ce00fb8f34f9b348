"""Siblings: the roles on paper, who is chosen, who is none, and a concept that splits as a crosscoder holds it."""

import numpy as np
import pandas
import pytest
import torch

from crosscoders import Crosscoder, CrosscoderConfig
from diffing.latents.decoder_norms import decoder_cosine
from diffing.latents.siblings import with_siblings
from diffing.latents.verdict import verdicts


def described(decoder: torch.Tensor, n_active: list[int] | None = None) -> pandas.DataFrame:
    """The table of a crosscoder with these decoders, whose ratios are all small, with siblings and verdicts."""
    dict_size, _, d_model = decoder.shape
    cc = Crosscoder(CrosscoderConfig(dict_size=dict_size, d_model=d_model, activation="relu")).requires_grad_(False)
    cc.W_dec.copy_(decoder)
    small = {f"nu_{target}{suffix}": 0.0 for target in ("error", "reconstruction") for suffix in ("", "_mirror")}
    errors = {f"{name}_stderr": 0.001 for name in small}
    table = pandas.DataFrame(
        {
            "n_active": n_active or [500] * dict_size,
            "relative_decoder_norm": cc.relative_decoder_norm.double().numpy(),
            "decoder_cosine": decoder_cosine(cc).double().numpy(),
            **small,
            **errors,
        }
    )
    table = with_siblings(cc, table)
    return table.assign(verdict=verdicts(table))


U, V, W, Z = torch.eye(4)
NONE = torch.zeros(4)
PARENT, ROTATED = torch.stack([U, U]), torch.stack([U, V])
CHILD = torch.stack([0.3 * U, W + 0.3 * U])


def test_a_child_has_its_parent_a_part_its_sibling_and_a_copy_its_original() -> None:
    child, part, copy = CHILD, torch.stack([0.4 * U, W]), torch.stack([0.4 * U, V])
    for first, second, role, verdict in (
        (child, PARENT, "parent", "tuned-specific"),
        (part, ROTATED, "part", "split"),
        (copy, ROTATED, "copy", "rotated"),
        (part, torch.stack([U, NONE]), "part", "split"),  # the concept of the base model by itself
    ):
        table = described(torch.stack([first, second]))
        assert table["sibling"][0] == 1 and table["sibling_cosine"][0] == pytest.approx(1, abs=1e-6)
        assert (table["sibling_role"][0], table["verdict"][0]) == (role, verdict)


def test_the_mirror_image_has_the_mirrored_verdicts() -> None:
    for first, second in ((CHILD, PARENT), (torch.stack([0.4 * U, W]), ROTATED)):
        there = described(torch.stack([first, second]))
        back = described(torch.stack([first, second]).flip(1))
        assert back["sibling_role"].tolist() == there["sibling_role"].tolist()
        assert back["verdict"][0] == there["verdict"][0].replace("tuned", "base")


def test_two_children_of_one_parent_are_not_parts_of_a_split() -> None:
    table = described(torch.stack([CHILD, torch.stack([0.3 * U, Z + 0.3 * U]), PARENT]))
    assert table["sibling"].tolist()[:2] == [2, 2] and table["verdict"].tolist()[:2] == ["tuned-specific"] * 2


def test_both_halves_of_a_concept_that_splits_evenly_are_split_and_so_are_those_of_one_that_merges() -> None:
    halves = torch.stack([torch.stack([U, V]), torch.stack([U, W])])
    for decoder in (halves, halves.flip(1)):
        assert described(decoder)["verdict"].tolist() == ["split", "split"]


def test_latents_that_are_not_alive_or_shared_have_no_sibling_and_are_not_chosen_when_dead() -> None:
    decoder = torch.stack([torch.stack([0.4 * U, W]), ROTATED, PARENT, torch.stack([V, Z])])
    table = described(decoder, n_active=[500, 5, 500, 500])
    assert table["sibling_role"][0] == "parent" and table["sibling"].isna().tolist() == [False, True, True, False]
    assert table["sibling"][0] == 2 and np.isnan(table["sibling_cosine"][1])
    alone = described(ROTATED[None])
    assert (
        alone["sibling"].isna().all() and np.isnan(alone["sibling_cosine"]).all() and alone["verdict"][0] == "rotated"
    )


def test_a_concept_that_splits_is_split_where_a_crosscoder_holds_it_as_a_difference() -> None:
    """One latent for the whole concept, one for the difference of its parts: the sum of their tuned decoders is the
    second part's direction."""
    whole, difference = torch.stack([U, V]), torch.stack([0.25 * U, 0.8 * (W - V)])
    table = described(torch.stack([whole, difference]))
    assert table["relative_decoder_norm"][1] > 0.7 and table["verdict"][1] == "split"
