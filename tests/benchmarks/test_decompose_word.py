"""Finding a word in importances: counts by hand, a planted piece, and a null that no piece passes."""

from typing import Any

import numpy as np
import pytest

from benchmarks.decompose.word import f1, moved_words, precision_recall, thresholded, words_of
from diffing.decomposition.readouts import Reading


def reading_of(ids: list[int], documents: list[int]) -> Reading:
    none = np.zeros((len(ids), 0))
    return Reading([], none, none, np.array(ids), np.array(documents), np.arange(len(ids)))


def tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, Any]:
    """`word` is 7 8, and 9 8 after a space."""
    assert not add_special_tokens
    return {"input_ids": [9 if text.startswith(" ") else 7, 8]}


def test_a_word_is_found_whole_with_and_without_a_space_and_never_across_documents() -> None:
    words = words_of(reading_of([7, 8, 1, 9, 8, 8, 7, 8], [0, 0, 0, 0, 0, 0, 0, 1]), tokenizer, "word")
    assert words.tolist() == [1, 1, 0, 2, 2, 0, 0, 0]


def test_precision_counts_tokens_and_recall_words() -> None:
    words = np.array([1, 1, 0, 2, 2, 0])
    on = np.array([True, True, True, False, False, False])
    assert precision_recall(on, words) == (2 / 3, 1 / 2)
    assert f1(2 / 3, 1 / 2) == pytest.approx(4 / 7)
    assert precision_recall(~on & (words == 9), words) == (0, 0) and f1(0, 0) == 0


def test_moved_words_stay_in_their_document_and_keep_their_tokens() -> None:
    words, documents = np.array([1, 1, 0, 0, 0, 2, 2, 0]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    moved = moved_words(words, documents, np.random.default_rng(0))
    assert sorted(moved[:4]) == [0, 0, 1, 1] and sorted(moved[4:]) == [0, 0, 2, 2]
    assert (moved != words).any()


def test_a_direction_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    generator = np.random.default_rng(0)
    n = 2000
    words = np.zeros(n, dtype=np.int64)
    words[::20] = np.arange(1, n // 20 + 1)
    first = np.arange(n) < n // 2
    sizes = generator.random((n, 3))
    sizes[words > 0, 1] += 2
    assert thresholded(sizes, words, first) > 0.9  # the best of 50 thresholds, not any
    sizes[~first, 1] = generator.random(n // 2)  # what marked the words in the first half says nothing in the second
    assert thresholded(sizes, words, first) < 0.3
