"""Labels by example against plain arithmetic, and images that are unknown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from radapter_serve.tasks.outcome import Outcome

from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.labels import MAX_EXAMPLES
from radapter_serve.tasks.classify import Classes, Classify, ClassifyRequest
from radapter_serve.tasks.label_source import LabelSource
from tests.helpers.small_models import release
from tests.helpers.small_release import CONFIDENCE, png

LABELS = [b"cat", b"dog", b"bird"]
IMAGES = [png(seed) for seed in range(4)]
SHOWN = [png(seed, kind="JPEG") for seed in range(10, 13)]


def classify_of(local, **facts) -> Classify:
    known = {"templates": ["a {}"], "logit_scale": 10.0, "confidence": CONFIDENCE, **facts}
    return Classify(release(**known), local.embed_images, local.embed_labels, {})


def ask(classify: Classify, images: list[bytes] = IMAGES, **options: Any) -> Classes:
    given: dict[str, Any] = {name: [value] * len(images) for name, value in options.items()}
    given.setdefault("labels", [LABELS] * len(images))
    return classify([ClassifyRequest(images, **given)])[0].unwrap()


def embeds(local, images: list[bytes]) -> np.ndarray:
    return np.asarray(local.embed_images([images])[0].unwrap(), np.float64)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
def test_examples_are_mixed_with_texts_by_their_weight(local, weight):
    texts = local.embed_labels([one.decode() for one in LABELS], ["a {}"]).embeds.astype(float)
    shown = embeds(local, SHOWN)
    w = 0.5 if weight is None else weight
    expected = texts.copy()
    expected[0] = unit((1 - w) * texts[0] + w * unit((shown[0] + shown[2]) / 2))
    expected[2] = unit((1 - w) * texts[2] + w * shown[1])
    logits = 10 * embeds(local, IMAGES) @ expected.T
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    more = {} if weight is None else {"example_weight": weight}
    found = ask(classify_of(local), examples=SHOWN, example_labels=[0, 2, 0], **more)
    names = np.array([one.decode() for one in LABELS])
    order = np.argsort(-scores, 1)
    assert found.labels.tolist() == names[order].tolist()
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, 1), rtol=1e-4)


def test_each_label_may_have_a_weight_of_its_own(local):
    texts = local.embed_labels([one.decode() for one in LABELS], ["a {}"]).embeds.astype(float)
    shown = embeds(local, SHOWN)
    weights = [0.25, 0.9, 1.0]
    expected = texts.copy()
    expected[0] = unit(0.75 * texts[0] + 0.25 * shown[0])
    expected[2] = shown[1]
    logits = 10 * embeds(local, IMAGES) @ expected.T
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = ask(
        classify_of(local), examples=SHOWN[:2], example_labels=[0, 2], example_weight=weights
    )
    np.testing.assert_allclose(found.scores, -np.sort(-scores, 1), rtol=1e-4)


BY_EXAMPLE = {"labels": 3, "examples": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"shown", r"^\[not_calibrated\] the label set 'shown' has labels by example, to which no"),
        (b"fitted", None),
        (b"texts", None),
    ],
)
def test_a_label_set_by_example_has_scores_that_were_fitted_to_it(local, name, message):
    label_set = local.embed_labels(["cat", "dog"], ["a {}"])
    own = {**CONFIDENCE, "scale": 3.0, "bias": 0.5}
    facts: dict[str, Any] = {
        "templates": ["a {}"],
        "logit_scale": 10.0,
        "confidence": CONFIDENCE,
        "label_sets": {
            "shown": BY_EXAMPLE,
            "fitted": {**BY_EXAMPLE, "confidence": own},
            "texts": {"labels": 2},
        },
    }
    sets = dict.fromkeys(("shown", "fitted", "texts"), label_set)
    classify = Classify(release(**facts), local.embed_images, local.embed_labels, sets)

    def scores(names: list[bytes]) -> np.ndarray:
        request = ClassifyRequest(
            IMAGES[: len(names)],
            label_set=names,
            multi_label=[True] * len(names),
            threshold=[0.0] * len(names),
        )
        return classify([request])[0].unwrap().scores

    if message is not None:
        with pytest.raises(TaskError, match=message):
            scores([name])
        return
    scale, bias = (3.0, 0.5) if name == b"fitted" else (6.0, -1.0)
    cosines = embeds(local, IMAGES[:1]) @ label_set.embeds.astype(float).T
    expected = -np.sort(-1 / (1 + np.exp(-(scale * cosines + bias))), 1)
    np.testing.assert_allclose(scores([name]), expected, rtol=1e-5)
    with pytest.raises(TaskError, match="label sets whose scores were fitted apart; ask"):
        scores([b"texts", b"fitted"])


def test_label_sets_by_example_are_not_for_segment(local):
    known = release(label_sets={"shown": BY_EXAMPLE, "texts": {"labels": 2}})
    sets = dict.fromkeys(("shown", "texts"), local.embed_labels(["a", "b"], ["{}"]))
    source = LabelSource(known, local.embed_labels, sets)
    assert source.read(None, [b"texts"], None).embed(None) == [sets["texts"]]
    with pytest.raises(TaskError, match="'shown' has labels by example, which are for classify"):
        source.read(None, [b"shown"], None)


def test_a_label_by_its_example_alone_is_what_the_example_is(local):
    found = ask(
        classify_of(local), SHOWN, examples=SHOWN, example_labels=[2, 0, 1], example_weight=1.0
    )
    assert found.labels[:, 0].tolist() == ["bird", "cat", "dog"]


def test_examples_are_embedded_once_and_may_be_left_out_of_later_rows(local):
    classify = classify_of(local)
    whole = ask(classify, examples=SHOWN, example_labels=[0, 2, 0])
    local.calls.clear()
    request = ClassifyRequest(
        IMAGES,
        [LABELS] * 4,
        examples=[SHOWN, *[[b""] * 3] * 3],
        example_labels=[[0, 2, 0]] * 4,
    )
    again = classify([request])[0].unwrap()
    assert [shape[0] for shape in local.calls] == [4]
    assert again.labels.tolist() == whole.labels.tolist()
    np.testing.assert_allclose(again.scores, whole.scores, rtol=1e-6)


def test_each_image_may_have_examples_of_its_own(local):
    classify = classify_of(local)
    request = ClassifyRequest(
        IMAGES[:2], [LABELS] * 2, examples=[SHOWN[:1], SHOWN[1:2]], example_labels=[[0], [1]]
    )
    together = classify([request])[0].unwrap()
    for row in range(2):
        alone = ask(classify, [IMAGES[row]], examples=[SHOWN[row]], example_labels=[row])
        assert together.labels[row].tolist() == alone.labels[0].tolist()
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-5)


def test_what_cancels_out_is_refused(local, monkeypatch):
    classify = classify_of(local)
    text = local.embed_labels(["cat"], ["a {}"]).embeds[0]
    opposite = [Outcome(-text[None])]
    monkeypatch.setattr(classify._by_example, "_embed_images", lambda requests: opposite)
    with pytest.raises(
        TaskError, match=r"^\[invalid_argument\] the examples of 'cat', or .* cancel"
    ):
        ask(classify, examples=[png(99)], example_labels=[0])


MANY = [png(seed, 4, 4) for seed in range(MAX_EXAMPLES + 1)]
ONE = {"examples": SHOWN[:1], "example_labels": [0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": SHOWN}, r"^\[invalid_argument\] examples and example_labels belong together"),
        ({"example_labels": [0]}, "belong together"),
        ({"example_weight": 0.5}, "belong together"),
        ({"examples": [], "example_labels": []}, "no examples"),
        ({"examples": SHOWN, "example_labels": [0, 1]}, "3 examples and 2 example_labels"),
        ({"examples": SHOWN[:1], "example_labels": [3]}, "example_labels has 3; .* 0 to 2"),
        ({"examples": SHOWN[:1], "example_labels": [-1]}, "example_labels has -1"),
        ({**ONE, "example_weight": float("nan")}, "example_weight is nan; numbers from 0"),
        ({**ONE, "example_weight": [0.5, 1.5, 0.1]}, "example_weight is 1.5; .* one for each"),
        ({**ONE, "example_weight": [0.5, 0.1]}, "example_weight has 2 numbers for 3 labels"),
        ({**ONE, "example_weight": []}, "example_weight is empty"),
        (
            {"examples": [SHOWN[0], b"nonsense"], "example_labels": [0, 1]},
            r"^\[invalid_argument\] example 2 of 2: 6 bytes are not an image",
        ),
        ({"examples": MANY, "example_labels": [0] * len(MANY)}, "129 examples .* at most 128"),
        ({**ONE, "unknown": 0.5}, r"^\[not_calibrated\] scores are not calibrated for examples"),
        ({**ONE, "multi_label": True}, r"^\[not_calibrated\]"),
        ({**ONE, "calibrated": True}, r"^\[not_calibrated\]"),
        ({"unknown": -0.1}, r"^\[invalid_argument\] unknown is .*-0.1.*; one number from 0 to 1"),
        ({"unknown": float("nan")}, "unknown is .*nan"),
        ({"unknown": 0.5, "multi_label": True}, "unknown does not go with multi_label"),
    ],
)
def test_bad_examples_are_refused_before_an_image_is_encoded(local, options, message):
    classify = classify_of(local)
    ask(classify)
    local.calls.clear()
    with pytest.raises(TaskError, match=message):
        ask(classify, **options)
    assert all(shape[0] < len(IMAGES) for shape in local.calls)


def test_an_image_that_no_label_fits_is_unknown(local):
    texts = local.embed_labels([one.decode() for one in LABELS], ["a {}"]).embeds.astype(float)
    best = (1 / (1 + np.exp(-(6.0 * embeds(local, IMAGES) @ texts.T - 1.0)))).max(1)
    least = float(np.median(best))
    classify = classify_of(local)
    plain = ask(classify)
    found = ask(classify, unknown=least)
    unknown = best < np.float32(least)
    assert unknown.any() and not unknown.all()
    for row in range(len(IMAGES)):
        if unknown[row]:
            assert found.labels[row].tolist() == ["unknown", "", ""]
            assert found.scores[row, 0] == pytest.approx(1 - best[row], abs=1e-5)
            assert not found.scores[row, 1:].any()
        else:
            assert found.labels[row].tolist() == plain.labels[row].tolist()
            np.testing.assert_array_equal(found.scores[row], plain.scores[row])
    with pytest.raises(TaskError, match="not_calibrated"):
        ask(classify_of(local, confidence=None), unknown=0.5)
