"""A decomposed model is the tuned one with every mask 1, the base with every mask 0, and in between what is written."""

import re

import pytest
import torch
from decompositions import recorded, recorded_decomposition
from torch import nn

from crosscoders.common.errors import InputError
from diffing.decomposition.importance import ScalarNetwork, SharedNetwork
from diffing.decomposition.model import Decomposition
from diffing.decomposition.sites import Delta, Masks, Site, find_sites

GENERATOR = torch.Generator().manual_seed(3)
W0, W1 = torch.randn(4, 3, generator=GENERATOR), torch.randn(4, 3, generator=GENERATOR)
X = torch.randn(2, 5, 3, generator=GENERATOR)


def test_all_masks_of_one_are_the_tuned_map_and_all_of_zero_the_base() -> None:
    site, bias = Site(Delta(W1 - W0), 6, GENERATOR, scale=0.7), torch.randn(4, generator=GENERATOR)
    out = X @ W1.T + bias
    ones, zeros = (Masks(torch.full((6,), m), torch.tensor(m)) for m in (1.0, 0.0))
    assert torch.equal(site.masked(X, out, ones), out)
    torch.testing.assert_close(site.masked(X, out, zeros), X @ W0.T + bias, rtol=0, atol=1e-5)


def test_a_masked_map_is_the_weight_that_the_masks_make() -> None:
    site = Site(Delta(W1 - W0), 6, GENERATOR, scale=0.7)
    m, m_remainder = torch.rand(6, generator=GENERATOR), torch.tensor(0.3)
    V, U = site.pieces()
    weight = W0 + (V * m @ U).T + m_remainder * (W1 - W0 - (V @ U).T)
    found = site.masked(X, X @ W1.T, Masks(m, m_remainder)).detach()
    torch.testing.assert_close(found, X @ weight.T, rtol=0, atol=1e-5)


def test_the_factored_form_computes_what_the_whole_matrix_does() -> None:
    left, right = torch.randn(4, 2, generator=GENERATOR), torch.randn(2, 3, generator=GENERATOR)
    u, s, vh = torch.linalg.svd(left @ right)
    factored = Site(Delta(torch.diag(s[:2]), vh[:2], u[:, :2]), 5, GENERATOR, scale=1.3)
    whole = Site(Delta(left @ right), 5, GENERATOR)
    whole.set_pieces(*factored.pieces())
    masks = Masks(torch.rand(2, 5, 5, generator=GENERATOR), torch.rand(2, 5, generator=GENERATOR))
    out = X @ W1.T
    torch.testing.assert_close(factored.masked(X, out, masks), whole.masked(X, out, masks), rtol=0, atol=1e-5)
    torch.testing.assert_close(1.3 * factored.remainder().norm(), whole.remainder().norm(), rtol=1e-5, atol=0)
    before = factored.V.detach().clone()
    factored.set_pieces(*factored.pieces())
    torch.testing.assert_close(factored.V.detach(), before)


def test_masks_leave_nothing_behind_and_weights_are_no_part_of_the_state() -> None:
    decomposition, ids = recorded_decomposition(), recorded("00")["input_ids"]
    before = decomposition.model(ids)
    with pytest.raises(RuntimeError), decomposition.masked(decomposition.constant(0, 0)):
        assert not torch.equal(decomposition.model(ids), before)
        raise RuntimeError
    assert torch.equal(decomposition.model(ids), before)
    kinds = {name.split(".")[-1] for name in decomposition.state_dict()}
    assert kinds == {"U", "V", "w1", "b1", "w2", "b2"}


def test_sites_read_what_their_maps_read() -> None:
    decomposition = recorded_decomposition()
    with decomposition.reading() as inputs:
        decomposition.model(recorded("00")["input_ids"])
    embedded = decomposition.model.embed[recorded("00")["input_ids"]]
    torch.testing.assert_close(inputs["a"], embedded)
    torch.testing.assert_close(inputs["b"], torch.tanh(decomposition.model.a(embedded)).detach())
    lower = decomposition.importances(inputs)["a"].lower
    assert lower.shape == (3, 4, 6) and bool(((lower >= 0) & (lower <= 1)).all())


def test_a_scalar_network_is_one_network_for_each_piece() -> None:
    network, h = ScalarNetwork(3, 4, GENERATOR), torch.randn(7, 3, generator=GENERATOR)
    before = network(h, h)
    changed = h.clone()
    changed[:, 1] += 1
    moved = (network(h, changed) != before).any(dim=0)
    assert moved.tolist() == [False, True, False]


def test_a_shared_network_does_not_depend_on_the_size_of_its_input() -> None:
    network, x = SharedNetwork(3, 4, 5, GENERATOR), torch.randn(7, 3, generator=GENERATOR)
    h = torch.zeros(7, 4)
    torch.testing.assert_close(network(x, h), network(100 * x, h), rtol=1e-4, atol=1e-4)


def test_sites_are_found_by_pattern_in_the_order_of_the_model() -> None:
    model = nn.ModuleDict(
        {"q": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "k": nn.Linear(2, 2), "e": nn.Embedding(2, 2)}
    )
    assert find_sites(model, ["k", "?"]) == ["q", "k"]
    message = "sites: 'v*' matches none of the 2 linear maps of ModuleDict (the first is q). Use a pattern such as"
    with pytest.raises(InputError, match=re.escape(message)):
        find_sites(model, ["q", "v*"])


def test_the_parameters_of_a_decomposition_are_its_pieces_and_networks() -> None:
    decomposition = recorded_decomposition()
    pieces, networks = decomposition.pieces_and_networks()
    assert isinstance(decomposition, Decomposition) and len(pieces) == 4 and len(networks) == 8
    assert not any(weight.requires_grad for weight in decomposition.model.parameters())
