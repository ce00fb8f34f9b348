"""One pass over a pair, and the directions that are made of it."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair

from crosscoders import InputError
from crosscoders.models.pair import ModelPair, inspect_pair, load_pair
from crosscoders.text.chats import read_chats
from crosscoders.text.tokens import Rows, tokenize_documents
from diffing.baselines.directions import SpanExchange
from diffing.baselines.observation import Observed, first_positions, observe
from diffing.baselines.pca import mean_direction, principal_directions
from diffing.causal.patching import measure
from diffing.causal.sets import PatchSet

POST = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def whole(pair: Pair) -> ModelPair:
    return load_pair(pair.base, pair.tuned, POST, device="cpu", dtype="float32", whole=True)


@pytest.fixture(scope="module")
def rows(pair: Pair, whole: ModelPair) -> Rows:
    return tokenize_documents(pair.config("unused").data_config(), whole.info.tokenizer)


@pytest.fixture(scope="module")
def observed(whole: ModelPair, rows: Rows) -> Observed:
    return observe(whole, rows, batch_rows=4, top=3)


def logits_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].log_softmax(dim=1)


def test_kl_and_gains_of_a_token_are_those_of_the_prediction_made_for_it(
    whole: ModelPair, rows: Rows, observed: Observed
) -> None:
    document = 3
    here = observed.documents == document
    ids = rows.ids[rows.offsets[document] : rows.offsets[document + 1]]
    base, tuned = (logits_of(model, ids) for model in whole.models)
    position = int(observed.positions[here][2])
    p, q = tuned[position - 1], base[position - 1]
    assert observed.kl[here][2] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert observed.gained_ids[here][2].tolist() == (p - q).topk(3).indices.tolist()
    assert observed.token_ids[here][2] == ids[position]


def test_every_scored_token_is_observed_once(rows: Rows, observed: Observed) -> None:
    places = set(zip(observed.documents.tolist(), observed.positions.tolist(), strict=True))
    assert len(places) == len(observed.kl) == rows.n_scored
    assert all((observed.positions[at] == place).all() for place, at in enumerate(first_positions(observed, 3), 1))


def test_a_pair_of_equal_models_is_one_line(pair: Pair, rows: Rows) -> None:
    info = inspect_pair(pair.base, pair.base, [POST], tokenizer=pair.tuned)
    same = load_pair(pair.base, pair.base, POST, device="cpu", dtype="float32", info=info, whole=True)
    with pytest.raises(InputError, match="no difference to describe"):
        observe(same, rows, batch_rows=4, top=3)


def test_principal_directions_of_a_planted_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(500, 5, generator=generator) * torch.tensor([4.0, 0.1, 2.0, 0.1, 0.1]) + 7.0
    found = principal_directions(delta, 2)
    assert found.vectors.abs()[0, 0] > 0.99 and found.vectors.abs()[1, 2] > 0.99
    assert found.scores[0] == pytest.approx(16 / 20, abs=0.05)


def test_the_mean_direction_scores_the_share_of_the_mean() -> None:
    found = mean_direction(torch.tensor([[3.0, 1.0], [3.0, -1.0]]))
    assert found.vectors.tolist() == [[1.0, 0.0]]
    assert found.scores.item() == pytest.approx(0.9)


def test_fewer_tokens_than_directions_is_one_line() -> None:
    with pytest.raises(InputError, match="4 principal directions need at least 5 tokens; got 3"):
        principal_directions(torch.zeros(3, 8), 4)


def test_a_span_exchanges_its_own_part_of_the_difference_and_nothing_else() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0], [5.0, 7.0, 3.5]]])
    exchange = SpanExchange(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0.6, 0.8, 0]]))
    parts = exchange.take_apart(x, torch.zeros(1, dtype=torch.bool))
    patched = {rows: exchange.patched(parts, PatchSet("x", "latents", rows), 1)[0].tolist() for rows in [(0, 1), (2,)]}
    assert patched[0, 1] == pytest.approx([5.0, 2.0, 3.0])  # the same direction twice is one
    assert patched[2,] == pytest.approx([1 + 0.6 * 6.4, 2 + 0.8 * 6.4, 3.0])
    assert exchange.patched(parts, PatchSet("none", "none"), 0)[0].tolist() == [5.0, 7.0, 3.5]


def test_all_directions_close_the_whole_kl(pair: Pair, whole: ModelPair) -> None:
    chats = read_chats(pair.config("unused").data_config(), whole.info.tokenizer, 5)
    sets = [PatchSet("none", "none"), PatchSet("whole", "latents", tuple(range(16))), PatchSet("one", "latents", (0,))]
    measured = measure(SpanExchange(torch.eye(16)), whole, chats, {"base_to_tuned": sets})["base_to_tuned"]
    none, every, one = measured.kl[0, :3].sum(axis=1)
    assert every < 1e-4 * none and one != pytest.approx(none, rel=1e-6)
