"""Tokens that gained, by frequency and by topic, and lenses of mean differences."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair

from crosscoders import EnvironmentFault, InputError
from crosscoders.models.pair import load_pair
from diffing.baselines.diff_mining import by_frequency, by_topic, token_frequencies
from diffing.baselines.mean_difference import difference_lens
from diffing.baselines.observation import Observed

POST = "blocks.1.hook_resid_post"


def observed(gained: list[list[int]], documents: list[int], gains: list[list[float]] | None = None) -> Observed:
    n = len(gained)
    numbers, values = torch.tensor(documents), torch.tensor(gains or [[1.0] * len(gained[0])] * n)
    positions = torch.arange(1, n + 1)
    return Observed(
        torch.zeros(n, 2, 3), torch.zeros(n).long(), positions, numbers, numbers * 0, torch.ones(n),
        torch.tensor(gained).int(), values,
    )  # fmt: skip


def test_frequency_is_the_share_of_positions_that_list_a_token() -> None:
    seen = observed([[4, 1], [4, 2], [4, 1], [3, 4]], [0, 0, 1, 1], [[1, 1], [1, 1], [1, 0], [1, 1]])
    assert token_frequencies(seen, 6).tolist() == [0, 0.25, 0.25, 0.25, 1.0, 0]
    mined = by_frequency(seen, 6)
    assert mined.ids.tolist() == [4, 1, 2, 3] and mined.weights.tolist() == [1.0, 0.25, 0.25, 0.25]


def test_what_the_null_lists_as_often_is_taken_off() -> None:
    seen = observed([[4, 1], [4, 2]], [0, 1])
    assert by_frequency(seen, 6, np.array([0, 0.5, 0, 0, 0.75, 0])).ids.tolist() == [2, 4]


def test_topics_are_the_groups_of_tokens_that_documents_share() -> None:
    pytest.importorskip("sklearn")
    seen = observed([[1, 2], [1, 2], [5, 6], [5, 6], [1, 2], [5, 6]], [0, 0, 1, 1, 2, 3])
    topics = by_topic(seen, 8, n_topics=2)
    assert {tuple(sorted(topic.ids[:2].tolist())) for topic in topics} == {(1, 2), (5, 6)}


def test_topics_without_scikit_learn_and_of_too_few_documents_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(EnvironmentFault, match=r"model-diffing\[topics\]"):
        by_topic(observed([[1, 2]], [0]), 8)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", type(sys)("stand-in"))
    monkeypatch.setattr(sys.modules["sklearn.decomposition"], "NMF", None, raising=False)
    with pytest.raises(InputError, match="3 topics need as many documents; got 1"):
        by_topic(observed([[1, 2]], [0]), 8)


def test_the_lens_reads_the_mean_difference_of_a_position_with_the_tuned_head(pair: Pair) -> None:
    whole = load_pair(pair.base, pair.tuned, POST, device="cpu", dtype="float32", whole=True)
    model: Any = whole.models[1]
    embedding = model.get_input_embeddings().weight
    written, others = [40, 51], [60, 61]
    x = torch.zeros(4, 2, 16)
    x[:2, 1] = embedding[written] / model.model.norm.weight.add(1)
    x[2:, 1] = embedding[others] / model.model.norm.weight.add(1)
    seen = observed([[1]] * 4, [0, 0, 1, 1])._replace(x=x, positions=torch.tensor([1, 2, 1, 2]))
    lenses = difference_lens(whole, seen, n_positions=2, top=2)
    assert [lens.position for lens in lenses] == [0, 1, 2] and [lens.n_tokens for lens in lenses] == [4, 2, 2]
    mean = (x[0, 1] + x[2, 1]) / 2
    with torch.inference_mode():
        best = model.lm_head(model.model.norm(mean)).topk(2).indices.tolist()
    assert lenses[1].tokens == [whole.info.tokenizer.decode([token]) for token in best]
    assert lenses[1].norm == pytest.approx(float(mean.norm()))
    with pytest.raises(InputError, match="no document has a token at position 3"):
        difference_lens(whole, seen, n_positions=3, top=2)
