"""Scores of labels: calibrated, and of each label by itself, against the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract.errors import INVALID_ARGUMENT, NOT_CALIBRATED, TaskError
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import LoadedRelease, complete
from radapter_serve.tasks.classify import ClassifyRequest, Ranking, ScoreRule, classify
from radapter_serve.tasks.embed import EmbedImagesRequest, Labels, embed_images, embed_labels
from radapter_serve.tasks.table import TASKS
from tests.helpers.small_release import CONFIDENCE, Local, png

NAMES = ("cat", "dog", "bird, fowl", "fish", "a man", "tree", "house")
TEMPLATES = ["a photo of a {}."]
IMAGES = [png(seed) for seed in range(6)]


def ask(
    loaded: LoadedRelease,
    images: Sequence[bytes] = IMAGES,
    labels: Labels = Labels(NAMES),  # noqa: B008
    **options: Any,
) -> list[Ranking]:
    return complete(classify(loaded, ClassifyRequest(images, labels, **options)))


@pytest.fixture
def label_set(local: Local) -> LabelSet:
    return complete(embed_labels(local.loaded, NAMES, TEMPLATES))


@pytest.fixture
def cosines(local: Local, label_set: LabelSet) -> np.ndarray:
    embeds = complete(embed_images(local.loaded, EmbedImagesRequest(IMAGES)))
    return embeds.astype(np.float64) @ label_set.embeds.T


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def check(found: Sequence[Ranking], scores: np.ndarray, names: Sequence[str]) -> None:
    """Each row has as many of the best labels as it has."""
    for ranking, own in zip(found, scores, strict=True):
        best = np.argsort(-own)[: len(ranking.labels)]
        assert list(ranking.labels) == [names[place] for place in best]
        np.testing.assert_allclose(ranking.scores, own[best], rtol=1e-4)


def test_calibrated_scores_are_a_softmax_at_the_temperature(
    local: Local, cosines: np.ndarray, label_set: LabelSet
) -> None:
    # Of the small release the scale is 10 and the temperature 2.
    cases: list[tuple[dict[str, Any], float]] = [({}, 10.0), ({"calibrated": True}, 5.0)]
    for options, scale in cases:
        found = ask(local.loaded, top_k=7, **options)
        assert [len(one.labels) for one in found] == [7] * 6
        check(found, softmax(scale * cosines), label_set.labels)
    assert [len(one.labels) for one in ask(local.loaded, calibrated=True)] == [5] * 6


def test_labels_that_stand_alone(local: Local, cosines: np.ndarray, label_set: LabelSet) -> None:
    scores = sigmoid(6.0 * cosines - 1.0)
    found = ask(local.loaded, multi_label=True, threshold=0.0)
    assert [len(one.labels) for one in found] == [7] * 6
    check(found, scores, label_set.labels)
    fewer = ask(local.loaded, multi_label=True, threshold=0.0, top_k=2)
    assert [len(one.labels) for one in fewer] == [2] * 6
    check(fewer, scores, label_set.labels)
    # Each is scored as it would be if it were the only one.
    [alone] = ask(local.loaded, IMAGES[:1], Labels(["cat"]), multi_label=True, threshold=0.0)
    assert alone.scores[0] == pytest.approx(scores[0, 0], rel=1e-5)


def test_labels_below_the_threshold_are_left_out(
    local: Local, cosines: np.ndarray, label_set: LabelSet
) -> None:
    scores = sigmoid(6.0 * cosines - 1.0)
    counts = (scores >= 0.5).sum(axis=1).tolist()
    assert len(set(counts)) > 1
    cases: list[dict[str, Any]] = [{}, {"threshold": 0.5}]
    for options in cases:
        found = ask(local.loaded, multi_label=True, **options)
        assert [len(one.labels) for one in found] == counts
        check(found, scores, label_set.labels)
    none = ask(local.loaded, multi_label=True, threshold=1.0)
    assert not any(one.labels for one in none)
    # On the wire, a row has one label at least.
    outputs = TASKS["classify"].write([none])
    assert outputs["label"].tolist() == [[b""]] * 6 and outputs["score"].tolist() == [[0]] * 6


def test_a_model_that_was_trained_with_a_sigmoid(
    local: Local, cosines: np.ndarray, label_set: LabelSet
) -> None:
    own = sigmoid(10.0 * cosines - 3.0)
    exact = sigmoid(6.0 * cosines - 1.0)
    loaded = local.changed(logit_bias=-3.0, confidence={**CONFIDENCE, "temperature": None})
    every = {"multi_label": True, "threshold": 0.0}
    for options, scores in (
        (every, exact),
        ({**every, "calibrated": True}, exact),
        ({"top_k": 7}, own),
        ({"top_k": 7, "calibrated": True}, exact),
    ):
        found = ask(loaded, **options)
        assert [len(one.labels) for one in found] == [7] * 6
        check(found, scores, label_set.labels)


@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"calibrated": True}])
@pytest.mark.parametrize("bias", [-1.0, None])
def test_labels_are_ranked_by_their_cosines_where_scores_are_equal(
    local: Local,
    cosines: np.ndarray,
    label_set: LabelSet,
    bias: float | None,
    options: dict[str, Any],
) -> None:
    """In float32 a sigmoid is 1 for all logits above 17, and a softmax is 0 for all that are far
    below the best.
    """
    fitted = {**CONFIDENCE, "scale": 1000.0, "bias": 900.0, "temperature": 1.0}
    loaded = local.changed(logit_scale=1000.0, confidence=fitted, logit_bias=bias)
    found = ask(loaded, **options)
    assert any((np.diff(one.scores) == 0).any() for one in found)
    for own, ranking in zip(cosines, found, strict=True):
        best = np.argsort(-own)[: len(ranking.labels)]
        assert list(ranking.labels) == [label_set.labels[place] for place in best]


@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
def test_of_equal_labels_the_first_comes_first(top_k: int | None) -> None:
    values = np.random.default_rng(0).integers(0, 4, 50).astype(np.float32) / 4
    names = tuple(map(str, range(50)))
    found = ScoreRule(top_k, 10.0, None).ranking(values, LabelSet(names, values, names, ()))
    expected = sorted(range(50), key=lambda place: -values[place])[:top_k]
    assert [int(name) for name in found.labels] == expected
    scores = softmax(10.0 * values[None].astype(np.float64))[0, expected]
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_an_image_that_no_label_fits_is_unknown(local: Local, cosines: np.ndarray) -> None:
    best = sigmoid(6.0 * cosines - 1.0).max(1)
    least = float(np.median(best))
    is_unknown = best < np.float32(least)
    assert is_unknown.any() and not is_unknown.all()
    cases: list[dict[str, Any]] = [{}, {"calibrated": True}]
    for options in cases:
        plain = ask(local.loaded, **options)
        found = ask(local.loaded, unknown=least, **options)
        for row, one in enumerate(found):
            if is_unknown[row]:
                assert list(one.labels) == ["unknown"]
                assert one.scores[0] == pytest.approx(1 - best[row], abs=1e-5)
            else:
                assert one.labels == plain[row].labels
                np.testing.assert_array_equal(one.scores, plain[row].scores)


@pytest.mark.parametrize("options", [{"multi_label": True}, {"calibrated": True}, {"unknown": 0.5}])
def test_calibrated_scores_are_for_the_alpha_of_the_release_alone(
    local: Local, options: dict[str, Any]
) -> None:
    """Also where another is as near as float32 has it."""
    loaded = local.changed(alpha=0.3, dynamic_alpha=True)
    own = np.float32(0.3)
    for same in (None, 0.3, float(own)):
        ask(loaded, IMAGES[:1], alpha=same, **options)
    with pytest.raises(TaskError, match=r"calibrated at alpha 0.3, not at 0\.25"):
        ask(loaded.at(0.25), IMAGES[:1], **options)  # a copy at another α is not calibrated either
    local.calls.clear()
    for near in (*(float(np.nextafter(own, np.float32(end))) for end in (0, 1)), 0.25):
        with pytest.raises(TaskError, match=r"calibrated at alpha 0.3, not at 0\.") as error:
            ask(loaded, IMAGES[:1], alpha=near, **options)
        assert error.value.code == NOT_CALIBRATED
    assert not local.calls


WHY = "export one with radapter-export --validation DATA"


UNFITTED: dict[str, Any] = {"confidence": None}
COLD: dict[str, Any] = {"confidence": {**CONFIDENCE, "temperature": None}}


@pytest.mark.parametrize(
    ("facts", "options", "code", "message"),
    [
        (UNFITTED, {"multi_label": True}, NOT_CALIBRATED, WHY),
        (UNFITTED, {"unknown": 0.5}, NOT_CALIBRATED, WHY),
        ({**UNFITTED, "logit_bias": -3.0}, {"calibrated": True}, NOT_CALIBRATED, WHY),
        (COLD, {"calibrated": True}, NOT_CALIBRATED, "this release has no temperature"),
        ({}, {"threshold": 0.5}, INVALID_ARGUMENT, "threshold leaves out labels"),
        ({}, {"threshold": -0.1, "multi_label": True}, INVALID_ARGUMENT, "threshold is -0.1; allo"),
        ({}, {"unknown": np.nan}, INVALID_ARGUMENT, "unknown is nan"),
        ({}, {"unknown": 0.5, "multi_label": True}, INVALID_ARGUMENT, "does not go with multi_la"),
    ],
)
def test_what_is_refused(
    local: Local, facts: dict[str, Any], options: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        ask(local.changed(**facts), **options)
    assert caught.value.code == code and message in caught.value.message
    assert not local.calls
