"""What counts as found, and the figures that it is decided by."""

import numpy as np
import pytest
import torch

from crosscoders.common.results import row
from diffing.comparison.judgement import Rows, found_directions, found_scores, found_texts, more_often, over_seeds
from diffing.comparison.overlap import span_overlap
from diffing.comparison.score_block import auroc, explained


def named(*rows: dict[str, object]) -> Rows:
    return {str(entry["name"]): entry for entry in rows}


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    scores, planted = np.array([3.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert auroc(scores, planted) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_labels_explain_all_of_scores_that_follow_them_and_little_of_others() -> None:
    documents, groups = np.array([0, 0, 1, 2, 3]), np.array([0, 0, 0, 1, 1])
    assert explained(np.array([1.0, 3.0, 2.0, 5.0, 5.0]), documents, groups) == pytest.approx(1)
    assert explained(np.array([0.0, 2.0, 3.0, 1.0, 3.0]), documents, groups) == pytest.approx(0)


def test_fishers_test_of_a_table_by_hand() -> None:
    """3 of 3 against 0 of 3: one of the 20 ways to place three hits."""
    assert more_often(3, 3, 0, 3) == pytest.approx(1 / 20)


def test_directions_find_a_behaviour_only_beyond_random_and_the_null() -> None:
    def seed(own: float, random: float) -> Rows:
        start = "directions.pca"
        return named(row(f"{start}.top_4.x", own, "share", 20), row(f"{start}.random.top_4.x", random, "share", 20))

    assert found_directions("pca", [seed(0.9, 0.0)], [seed(0.0, 0.0)], ["x"]) == {"x": True}
    assert found_directions("pca", [seed(0.9, 0.9)], [seed(0.0, 0.0)], ["x"]) == {"x": False}
    assert found_directions("pca", [seed(0.9, 0.0)], [seed(0.8, 0.0)], ["x"]) == {"x": False}
    assert found_directions("pca", [seed(0.0, 0.0)], [seed(0.0, 0.0)], ["x"]) == {"x": False}


def test_scores_find_only_with_intervals_apart_in_every_seed() -> None:
    def seed(low: float) -> Rows:
        return named(
            row("scores.kl-map.auroc", low + 0.05, "AUROC", 9, low, low + 0.1),
            row("scores.kl-map.random.auroc", 0.5, "AUROC", 9, 0.45, 0.55),
        )

    assert found_scores("kl-map", [seed(0.8), seed(0.8)], [seed(0.5), seed(0.5)])
    assert not found_scores("kl-map", [seed(0.8), seed(0.5)], [seed(0.5), seed(0.5)])
    assert not found_scores("kl-map", [seed(0.8), seed(0.8)], [seed(0.8), seed(0.8)])


def test_texts_find_by_their_pooled_hits() -> None:
    def seed(own: int) -> Rows:
        return named(row("texts.say.hits", own, "samples", 100), row("texts.say.random.hits", 0, "samples", 100))

    assert found_texts("say", [seed(10)], [seed(0)]) and not found_texts("say", [seed(1)], [seed(0)])
    assert not found_texts("say", [seed(10)], [seed(9)])


def test_means_over_seeds_keep_the_interval_of_one_and_make_one_of_several() -> None:
    one = named(row("a", 1.0, "x", 5, 0.5, 1.5))
    assert over_seeds([one])["a"] == row("a", 1.0, "x", 5, 0.5, 1.5)
    both = over_seeds([one, named(row("a", 3.0, "x", 5), row("b", 1.0, "x", 1))])
    assert both.keys() == {"a"} and both["a"]["value"] == 2 and both["a"]["low"] < -10


def test_a_line_in_a_plane_overlaps_fully_and_at_right_angles_not_at_all() -> None:
    plane = torch.eye(3)[:2]
    assert span_overlap(torch.tensor([[1.0, 1.0, 0.0]]), plane) == pytest.approx(1)
    assert span_overlap(torch.tensor([[0.0, 0.0, 1.0]]), plane) == pytest.approx(0)
