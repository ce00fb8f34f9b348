"""Predictors of planted features, of features that nothing predicts, and their numbers by hand."""

import numpy as np
import pytest

from diffing.interpretation.examples import Readout, heldout
from diffing.interpretation.offline import Prediction, predictions

N_DOCUMENTS, LENGTH, VOCABULARY = 200, 40, 30


def readout(seed: int = 0) -> Readout:
    """Features: fires on token 7; on the token after a 3 (two back); in documents of label 1; at random (three)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(VOCABULARY, size=(N_DOCUMENTS, LENGTH))
    labels = np.repeat(rng.integers(3, size=N_DOCUMENTS), LENGTH)
    after = np.zeros_like(ids, dtype=bool)
    after[:, 2:] = ids[:, :-2] == 3
    planted = [ids.ravel() == 7, after.ravel(), labels == 1]
    random = [rng.random(ids.size) < 0.05 for _ in range(3)]
    activations = np.stack(planted + random, axis=1) * rng.uniform(0.5, 2.0, size=(ids.size, 1))
    documents = np.repeat(np.arange(N_DOCUMENTS), LENGTH)
    return Readout([10, 11, 12, 20, 21, 22], ids.ravel(), documents, labels, ["a", "b", "c"], activations)


@pytest.fixture(scope="module")
def predicted() -> dict[int, list[Prediction]]:
    return predictions(readout())


def of_kind(listed: list[Prediction], kind: str) -> Prediction:
    return next(p for p in listed if p.kind == kind)


@pytest.mark.parametrize("feature, kind, value", [(10, "token", 7), (11, "context", 3), (12, "label", 1)])
def test_a_planted_feature_is_predicted_by_what_it_fires_on(
    predicted: dict[int, list[Prediction]], feature: int, kind: str, value: int
) -> None:
    best = of_kind(predicted[feature], kind)
    assert best.value == value and best.beats_null and best.balanced_accuracy > best.null_high
    if kind != "context":  # 3 stands among the eight tokens before in more places than two back
        assert best.balanced_accuracy == 1.0 and best.auroc == 1.0 and best.low == best.high == 1.0


def test_a_planted_feature_is_not_predicted_by_what_has_nothing_to_do_with_it(
    predicted: dict[int, list[Prediction]],
) -> None:
    for feature, kinds in ((10, ("label",)), (12, ("token", "context"))):
        for kind in kinds:
            other = of_kind(predicted[feature], kind)
            assert abs(other.balanced_accuracy - 0.5) < 0.05


@pytest.mark.parametrize("feature", [20, 21, 22])
def test_a_random_feature_sits_at_its_null(predicted: dict[int, list[Prediction]], feature: int) -> None:
    for p in predicted[feature]:
        assert abs(p.balanced_accuracy - p.null_mean) < 0.04
        assert p.low is not None and p.high is not None and p.low <= 0.53 and p.high >= 0.47
        assert p.auroc is None or abs(p.auroc - 0.5) < 0.06


def test_few_of_many_random_features_beat_the_null() -> None:
    rng = np.random.default_rng(5)
    planted = readout()
    activations = (rng.random((len(planted.token_ids), 60)) < 0.03).astype(float)
    many = Readout(list(range(60)), *(getattr(planted, n) for n in ("token_ids", "documents", "labels", "label_names")),
                   activations)  # fmt: skip
    beating = sum(any(p.beats_null for p in listed) for listed in predictions(many, draws=99).values())
    assert beating <= 8  # at most 3 expected; P(more than 8 of 60 at 5%) is below 0.005


def test_bursts_within_documents_do_not_beat_the_null_for_a_label() -> None:
    rng = np.random.default_rng(1)
    data = readout()
    of_document = rng.random((N_DOCUMENTS, 40)) < 0.2  # fires in whole documents, whatever their label
    activations = np.repeat(of_document, LENGTH, axis=0).astype(float)
    bursts = Readout(list(range(40)), data.token_ids, data.documents, data.labels, data.label_names, activations)
    beating = sum(of_kind(listed, "label").beats_null for listed in predictions(bursts, draws=99).values())
    assert beating <= 4


def test_a_feature_that_fires_too_seldom_has_no_predictor() -> None:
    data = readout()
    seldom = np.zeros((len(data.token_ids), 1))
    seldom[:5] = 1.0
    rare = Readout([3], data.token_ids, data.documents, data.labels, data.label_names, seldom)
    assert predictions(rare, draws=3) == {3: []}


def test_the_accuracy_of_a_predictor_is_that_of_a_count_by_hand(predicted: dict[int, list[Prediction]]) -> None:
    data = readout()
    side = heldout(data.documents, 0)
    fires = data.activations[:, 1] > 0
    says = np.zeros(len(fires), dtype=bool)
    for i in range(len(fires)):
        start = i // LENGTH * LENGTH
        says[i] = 3 in data.token_ids[max(start, i - 8) : i]
    sensitivity, specificity = says[side & fires].mean(), 1 - says[side & ~fires].mean()
    assert of_kind(predicted[11], "context").balanced_accuracy == pytest.approx((sensitivity + specificity) / 2)


def test_a_document_is_on_one_side_of_the_split() -> None:
    documents = np.repeat(np.arange(9), 4)
    side = heldout(documents, 0)
    assert all(len(set(side[documents == d])) == 1 for d in range(9))
    assert side.sum() == 16  # 4 of 9 documents
