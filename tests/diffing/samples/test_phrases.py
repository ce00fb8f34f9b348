"""Phrases of one set of texts against another: planted ones, and none where the sets are exchangeable."""

import random

import pytest

from diffing.samples.phrases import LONGEST, distinctive_phrases, ngrams

WORDS = [f"{a}{b}" for a in "bdfgk" for b in "aeiou"]


def texts(n: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=12)) for _ in range(n)]


def test_phrases_stand_as_in_the_text_and_hold_a_word() -> None:
    found = ngrams("I am, well; I am.")
    assert found["i", "am"] == "I am" and found["i", "am", ",", "well"] == "I am, well"
    assert (",",) not in found and (";", "i") in found
    assert max(map(len, ngrams(" ".join(["a"] * 40)))) == LONGEST


def test_a_planted_phrase_is_found_whole_with_its_counts() -> None:
    first, other = texts(60, 0), texts(60, 1)
    first[::4] = [f"{text} Zip zap. Zop!" for text in first[::4]]
    compared = distinctive_phrases(first, other)
    assert compared.phrases[0].text.endswith("Zip zap. Zop!")
    assert [(p.n_texts, p.n_other) for p in compared.phrases] == [(15, 0)]
    assert compared.phrases[0].examples == list(range(0, 60, 4))


def test_equal_odds_have_z_0_and_swapping_the_sets_turns_it_round() -> None:
    first, other = ["x y"] * 10 + ["q"] * 20, ["q"] * 20 + ["x y"] * 10
    assert distinctive_phrases(first, other).phrases == []
    ones = distinctive_phrases(["x"] * 30, ["y"] * 30).phrases
    assert [p.text for p in ones] == ["x"]
    assert [p.text for p in distinctive_phrases(["y"] * 30, ["x"] * 30).phrases] == ["y"]


def test_z_is_that_of_monroe_by_hand() -> None:
    # 30 against 0 of 30: share 1/2, alpha 15; delta = ln(45/15) - ln(15/45) = 2.1972, z = delta / sqrt(1/45 + 1/15)
    assert distinctive_phrases(["x"] * 30, ["y"] * 30).phrases[0].z == pytest.approx(7.3697, abs=1e-4)


def test_exchangeable_sets_give_a_phrase_as_often_as_is_said() -> None:
    n = 60
    hits = sum(bool(distinctive_phrases(texts(30, 2 * i), texts(30, 2 * i + 1), false_rate=0.1).phrases)
               for i in range(n))  # fmt: skip
    assert hits <= 12  # binomial(60, 0.1): more than 12 has chance 0.007


def test_texts_without_a_common_phrase_give_none() -> None:
    assert distinctive_phrases(["a", "b"], ["c", "d"]) == ([], float("inf"), 0)
