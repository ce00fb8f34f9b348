"""Shares by place around a response: a worked example, any cut into batches, the whole of a real cache."""

from pathlib import Path

import pytest
import torch

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig
from crosscoders.dictionary import selection
from diffing.latents.positions import PLACES, PositionSums, place_indices
from diffing.latents.table import scale_cache

TEXT, TEMPLATE, USER, RESPONSE = 0, 1, 2, 3


def test_places_of_a_worked_example() -> None:
    chat = [TEMPLATE, TEMPLATE, USER, TEMPLATE, TEMPLATE, RESPONSE, RESPONSE, TEMPLATE]
    again = [TEMPLATE, USER, TEMPLATE, RESPONSE, TEMPLATE]  # two responses in one document
    roles = torch.tensor(chat + again + [TEXT] + chat[3:], dtype=torch.uint8)
    documents = torch.tensor([0] * 13 + [1] + [2] * 5)
    positions = torch.cat([torch.arange(1, 14), torch.arange(1, 2), torch.arange(1, 6)])
    assert [PLACES[i] for i in place_indices(roles, positions, documents)] == [
        "template_-5", "template_-4", "other", "template_-2", "template_-1", "response_1", "response_2",
        "template_-4", "template_-3", "other", "template_-1", "response_1", "template_other",
        "other",
        "template_-2", "template_-1", "response_1", "response_2", "template_other",
    ]  # fmt: skip


def test_long_responses_and_far_template_tokens_are_counted_together() -> None:
    roles = torch.tensor([TEMPLATE] * 10 + [RESPONSE] * 12, dtype=torch.uint8)
    found = [PLACES[i] for i in place_indices(roles, torch.arange(22), torch.zeros(22, dtype=torch.int64))]
    assert found[:3] == ["template_other", "template_other", "template_-8"] and found[9] == "template_-1"
    assert found[10] == "response_1" and found[18] == "response_9" and found[19:] == ["response_later"] * 3


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_the_cut_into_batches_does_not_matter(cache_folder: Path, batch_size: int) -> None:
    cache, cc = ActivationCache(cache_folder), Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16))
    cc.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    sums = PositionSums(12)
    for tokens in cache.batches(batch_size):
        pre_acts = cc.pre_acts(cc.normalise(tokens.activations)).detach()
        sums.add(selection.active(pre_acts, cc.gate_at()), tokens)
    f, tokens = cc.encode(cache.read(0, 600).activations).detach().double(), cache.read(0, 600)
    at = place_indices(tokens.roles, tokens.positions, tokens.document_ids)
    mass = torch.zeros(12, len(PLACES), dtype=torch.float64).index_add_(1, at, f.T)
    torch.testing.assert_close(sums.shares(), mass / mass.sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_shares_agree_with_the_template_share_and_add_up(cache_folder: Path) -> None:
    cc = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    cc.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    scales, contexts, shares = scale_cache(cc, ActivationCache(cache_folder))
    alive = scales["n_active"] > 0
    torch.testing.assert_close(shares[alive].sum(dim=1), torch.ones(int(alive.sum())).double())
    template = shares[:, : PLACES.index("template_other") + 1].sum(dim=1)
    torch.testing.assert_close(template, contexts.shares()[:, -1])
    assert template.max() > 0
