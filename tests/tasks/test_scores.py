"""Scores of labels: calibrated, and of labels that stand alone, against the formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from radapter_serve.tasks.scores import Scores, Scoring

from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.tasks.classify import Classes, Classify, ClassifyRequest, EmbedImages
from tests.helpers.small_models import release
from tests.helpers.small_release import CONFIDENCE, png

LABELS = [b"cat", b"dog", b"bird, fowl", b"fish", b"a man", b"tree", b"house"]
TEMPLATES = ["a {}"]


def classify_of(local, **facts) -> Classify:
    known = {"templates": TEMPLATES, "logit_scale": 10.0, "confidence": CONFIDENCE, **facts}
    return Classify(release(**known), local.embed_images, local.embed_labels, {})


def ask(classify: Classify, images: list[bytes], **options) -> Classes:
    given: dict[str, Any] = {name: [value] * len(images) for name, value in options.items()}
    return classify([ClassifyRequest(images, [LABELS] * len(images), **given)])[0].unwrap()


def cosines(local, images: list[bytes]) -> np.ndarray:
    embeds = local.embed_images([images])[0].unwrap()
    return (
        embeds.astype(np.float64)
        @ local.embed_labels([one.decode() for one in LABELS], TEMPLATES).embeds.T
    )


def names(local) -> np.ndarray:
    return np.array(local.embed_labels([one.decode() for one in LABELS], TEMPLATES).labels)


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, axis=1)
    return order, np.take_along_axis(scores, order, axis=1)


IMAGES = [png(seed) for seed in range(6)]


def test_calibrated_scores_are_a_softmax_at_the_temperature_and_keep_the_order(local):
    classify = classify_of(local)
    found = ask(classify, IMAGES, calibrated=True, top_k=7)
    plain = ask(classify, IMAGES, top_k=7)
    assert found.labels.tolist() == plain.labels.tolist()
    np.testing.assert_allclose(
        found.scores, ranked(softmax(10.0 / 2.0 * cosines(local, IMAGES)))[1], rtol=1e-4
    )
    np.testing.assert_allclose(
        plain.scores, ranked(softmax(10.0 * cosines(local, IMAGES)))[1], rtol=1e-4
    )
    assert ask(classify, IMAGES, calibrated=True).labels.shape == (6, 5)


def test_a_release_that_carries_nothing_answers_as_one_that_does(local):
    with_it = ask(classify_of(local), IMAGES)
    without = ask(classify_of(local, confidence=None), IMAGES)
    assert with_it.labels.tolist() == without.labels.tolist()
    np.testing.assert_array_equal(with_it.scores, without.scores)


def test_labels_that_stand_alone(local):
    order, scores = ranked(sigmoid(6.0 * cosines(local, IMAGES) - 1.0))
    found = ask(classify_of(local), IMAGES, multi_label=True, threshold=0.0)
    assert found.labels.tolist() == names(local)[order].tolist()
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    fewer = ask(classify_of(local), IMAGES, multi_label=True, threshold=0.0, top_k=2)
    assert fewer.labels.tolist() == found.labels[:, :2].tolist()


def test_labels_below_the_threshold_are_left_out(local):
    order, scores = ranked(sigmoid(6.0 * cosines(local, IMAGES) - 1.0))
    counts = (scores >= 0.5).sum(axis=1)
    assert len(set(counts)) > 1
    for options in ({}, {"threshold": 0.5}):
        found = ask(classify_of(local), IMAGES, multi_label=True, **options)
        assert found.labels.shape == (6, max(counts))
        for row, count in enumerate(counts):
            assert found.labels[row].tolist() == [
                *names(local)[order[row, :count]],
                *[""] * (max(counts) - count),
            ]
            np.testing.assert_allclose(found.scores[row, :count], scores[row, :count], rtol=1e-4)
            assert not found.scores[row, count:].any()
    none = ask(classify_of(local), IMAGES, multi_label=True, threshold=1.0)
    assert none.labels.tolist() == [[""]] * 6 and not none.scores.any()


def test_a_label_is_scored_alike_whatever_others_there_are(local):
    def alone(labels: list[bytes]) -> float:
        request = ClassifyRequest([IMAGES[0]], [labels], multi_label=[True], threshold=[0.0])
        classes = classify_of(local)([request])[0].unwrap()
        return float(classes.scores[0, classes.labels[0].tolist().index("cat")])

    assert (
        alone([b"cat"])
        == pytest.approx(alone(LABELS), rel=1e-5)
        == pytest.approx(alone(LABELS[:3]), rel=1e-5)
    )


def test_a_model_that_was_trained_with_a_sigmoid(local):
    own = sigmoid(10.0 * cosines(local, IMAGES) - 3.0)
    exact = sigmoid(6.0 * cosines(local, IMAGES) - 1.0)
    classify = classify_of(local, logit_bias=-3.0, confidence={**CONFIDENCE, "temperature": None})
    every = {"multi_label": True, "threshold": 0.0}
    for options, scores in (
        (every, exact),
        ({**every, "calibrated": True}, exact),
        ({"top_k": 7}, own),
        ({"top_k": 7, "calibrated": True}, exact),
    ):
        np.testing.assert_allclose(
            ask(classify, IMAGES, **options).scores, ranked(scores)[1], rtol=1e-4
        )


@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"calibrated": True}, {"top_k": 3}])
@pytest.mark.parametrize("facts", [{"logit_bias": -1.0}, {"logit_bias": None}])
def test_labels_are_ranked_by_their_cosines_where_scores_are_equal(local, facts, options):
    """In float32 a sigmoid is 1 for all logits above 17, and a softmax is 0 for all that are far
    below the best.
    """
    order = np.argsort(-cosines(local, IMAGES), axis=1)
    fitted = {**CONFIDENCE, "scale": 1000.0, "bias": 900.0, "temperature": 1.0}
    classify = classify_of(local, logit_scale=1000.0, confidence=fitted, **facts)
    found = ask(classify, IMAGES, **options)
    assert (np.diff(found.scores) == 0).any()
    for row, labels in enumerate(found.labels):
        shown = [label for label in labels if label]
        assert shown == names(local)[order[row, : len(shown)]].tolist()


def test_label_sets_are_ranked_by_their_cosines(local):
    embed = local.embed_images([IMAGES])[0].unwrap()
    large = LabelSet(tuple("abcdef"), embed, tuple("abcdef"), ("{}",))
    small = LabelSet(("x", "y"), embed[:2], ("x", "y"), ("{}",))
    sure = {"scale": 1000.0, "bias": 900.0}
    facts = release(
        templates=TEMPLATES, logit_scale=1000.0, logit_bias=900.0, confidence={**CONFIDENCE, **sure}
    )
    classify = Classify(
        facts, local.embed_images, local.embed_labels, {"large": large, "small": small}
    )
    [found] = classify([ClassifyRequest(IMAGES, label_set=[b"large"] * 6, top_k=[1] * 6)])
    assert found.unwrap().labels.ravel().tolist() == list("abcdef")
    # As many labels as the smaller of two has; labels that stand alone are as many as the one with
    # most has.
    mixed = ClassifyRequest(IMAGES[:2], label_set=[b"large", b"small"])
    alone = dataclasses.replace(mixed, multi_label=[True] * 2, threshold=[0.0] * 2)
    of_both, of_each = (outcome.unwrap() for outcome in classify([mixed, alone]))
    assert of_both.labels[:, 0].tolist() == [
        "a",
        "y",
    ] and of_both.labels.shape == of_both.scores.shape == (2, 2)
    assert sorted(of_each.labels[0]) == list("abcdef") and of_each.labels[1].tolist() == [
        "y",
        "x",
        "",
        "",
        "",
        "",
    ]
    assert of_each.scores[1].tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 40, 100])
def test_of_equal_labels_the_first_comes_first(top_k):
    values = np.random.default_rng(0).integers(0, 4, 50).astype(np.float32) / 4
    best, scores = Scores(top_k, 10.0, None).best(values)
    expected = sorted(range(50), key=lambda place: -values[place])[:top_k]
    assert best.tolist() == expected
    np.testing.assert_allclose(
        scores, softmax(10.0 * values[None].astype(np.float64))[0, expected], rtol=1e-5
    )


@pytest.mark.parametrize("options", [{"multi_label": True}, {"calibrated": True}])
def test_calibrated_scores_are_for_the_alpha_of_the_release_alone(local, options):
    """Also where another is as near as float32 has it, and in a later row."""
    facts = release(alpha=0.3, dynamic_alpha=True, templates=TEMPLATES, confidence=CONFIDENCE)
    scoring = Scoring(facts)
    given: dict[str, Any] = {name: [value] * 2 for name, value in options.items()}
    own = np.float32(0.3)
    assert scoring(**given, alpha=facts.request_alpha([0.3, float(own)], 2)) == scoring(
        **given, alpha=None
    )
    nearest = [float(np.nextafter(own, np.float32(end))) for end in (0, 1)]
    for near in (*nearest, 0.301):
        with pytest.raises(
            TaskError, match=rf"calibrated at alpha 0.3, not at {np.float32(near)!s}"
        ):
            scoring(**given, alpha=facts.request_alpha([0.3, near], 2))


def test_embeddings_that_are_not_finite_are_no_ranking(local):
    facts = release(templates=TEMPLATES)
    embed = EmbedImages(facts, lambda pixels: np.full((len(pixels), 8), np.nan, np.float32))
    [outcome] = Classify(facts, embed, local.embed_labels, {})(
        [ClassifyRequest([IMAGES[0]], [LABELS])]
    )
    assert "embeddings hold values that are not finite" in str(outcome.error)


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        (
            {"confidence": None},
            {"multi_label": True},
            "[not_calibrated] this release has no calibrated scores; export",
        ),
        (
            {"confidence": None},
            {"calibrated": True},
            "[not_calibrated] this release has no calibrated scores; export",
        ),
        (
            {"confidence": {**CONFIDENCE, "temperature": None}},
            {"calibrated": True},
            "[not_calibrated] this release has no",
        ),
        ({"logit_bias": -3.0, "confidence": None}, {"calibrated": True}, "[not_calibrated]"),
        (
            {"logit_bias": -3.0, "confidence": None},
            {"multi_label": True},
            (
                "[not_calibrated] this release has no calibrated scores; export one with"
                " radapter-export --validation DATA"
            ),
        ),
        ({}, {"threshold": 0.5}, "[invalid_argument] threshold leaves out"),
        ({}, {"threshold": 0.5, "multi_label": False}, "[invalid_argument] threshold leaves out"),
        (
            {},
            {"threshold": -0.1, "multi_label": True},
            "[invalid_argument] threshold is [-0.1]; one number from 0 to 1",
        ),
        (
            {},
            {"threshold": float("nan"), "multi_label": True},
            "[invalid_argument] threshold is [nan]",
        ),
        (
            {},
            {"top_k": 0, "multi_label": True},
            "[invalid_argument] top_k is [0]; one whole number from 1",
        ),
        (
            {"dynamic_alpha": True},
            {"multi_label": True, "alpha": 0.25},
            "calibrated at alpha 0.5, not at 0.25",
        ),
    ],
)
def test_what_is_refused(local, facts, options, message):
    with pytest.raises(TaskError) as caught:
        ask(classify_of(local, **facts), IMAGES[:1], **options)
    assert message in str(caught.value)


def test_images_of_a_request_share_what_they_ask_for(local):
    request = ClassifyRequest(IMAGES[:2], [LABELS] * 2, multi_label=[True, False])
    [outcome] = classify_of(local)([request])
    assert "multi_label is [True, False]; one for all images" in str(outcome.error)


def test_requests_of_all_kinds_share_a_batch(local):
    classify = classify_of(local)
    requests = [
        ClassifyRequest([IMAGES[0]], [LABELS]),
        ClassifyRequest([IMAGES[0]], [LABELS], multi_label=[True]),
        ClassifyRequest([IMAGES[0]], [LABELS], threshold=[0.5]),
        ClassifyRequest([IMAGES[0]], [LABELS], calibrated=[True]),
    ]
    together = classify(requests)
    for request, outcome in zip(requests, together, strict=True):
        [one] = classify([dataclasses.replace(request)])
        assert str(one.error) == str(outcome.error)
        if outcome.error is None:
            np.testing.assert_allclose(one.unwrap().scores, outcome.unwrap().scores, rtol=1e-5)
