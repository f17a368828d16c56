"""Labels by example against plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract.errors import INVALID_ARGUMENT, NOT_CALIBRATED, TaskError
from radapter_serve.encoders.labels import MAX_EXAMPLES, Examples, LabelSet
from radapter_serve.encoders.loaded import LoadedRelease, complete
from radapter_serve.tasks.classify import ClassifyRequest, Ranking, classify, mix_examples
from radapter_serve.tasks.embed import EmbedImagesRequest, Labels, embed_images, embed_labels
from radapter_serve.tasks.segment import SegmentRequest, segment
from radapter_serve.tasks.table import TASKS
from tests.helpers.small_release import Local, png

NAMES = ("cat", "dog", "bird")
TEMPLATES = ["a photo of a {}."]
IMAGES = [png(seed) for seed in range(4)]
SHOWN = tuple(png(seed, kind="JPEG") for seed in range(10, 13))


def ask(
    loaded: LoadedRelease, examples: Examples | None = None, images: Sequence[bytes] = IMAGES
) -> list[Ranking]:
    request = ClassifyRequest(images, Labels(NAMES), examples=examples)
    return complete(classify(loaded, request))


def embeds(local: Local, images: Sequence[bytes]) -> np.ndarray:
    found = complete(embed_images(local.loaded, EmbedImagesRequest(images)))
    return found.astype(np.float64)


def texts_of(local: Local) -> np.ndarray:
    return complete(embed_labels(local.loaded, NAMES, TEMPLATES)).embeds.astype(np.float64)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def check(local: Local, found: Sequence[Ranking], labels: np.ndarray) -> None:
    """A softmax of 10 times the cosines with these embeddings of the labels."""
    logits = 10 * embeds(local, IMAGES) @ labels.T
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for ranking, own in zip(found, scores, strict=True):
        best = np.argsort(-own)
        assert list(ranking.labels) == [NAMES[place] for place in best]
        np.testing.assert_allclose(ranking.scores, own[best], rtol=1e-4)


@pytest.mark.parametrize("weights", [None, (0.0,), (0.3,), (0.25, 0.9, 1.0)])
def test_examples_are_mixed_with_texts_by_their_weight(
    local: Local, weights: tuple[float, ...] | None
) -> None:
    shown = embeds(local, SHOWN)
    first, _, third = np.broadcast_to(weights or (0.5,), 3)
    expected = texts_of(local)
    expected[0] = unit((1 - first) * expected[0] + first * unit((shown[0] + shown[2]) / 2))
    expected[2] = unit((1 - third) * expected[2] + third * shown[1])
    examples = Examples(SHOWN, (0, 2, 0), *([weights] if weights else []))
    check(local, ask(local.loaded, examples), expected)


def test_examples_are_embedded_once(local: Local) -> None:
    examples = Examples((*SHOWN, SHOWN[0]), (0, 2, 0, 1))
    whole = ask(local.loaded, examples)
    # The texts, each example, which its first caller brings alone, and the images.
    assert [shape[0] for shape in local.calls] == [3, 1, 1, 1, 4]
    local.calls.clear()
    again = ask(local.loaded, examples)
    assert [shape[0] for shape in local.calls] == [4]
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)


def column(*rows: Any, kind: Any = object) -> np.ndarray:
    return np.array(rows, kind)


def read(local: Local, **inputs: np.ndarray) -> list[ClassifyRequest]:
    return TASKS["classify"].read(local.loaded, inputs, lambda name: True)


def test_rows_have_examples_of_their_own_or_those_of_the_row_before(local: Local) -> None:
    rows = [SHOWN, [b""] * 3, SHOWN[::-1], [b""] * 3]
    requests = read(
        local,
        image=column(*[[image] for image in IMAGES]),
        labels=column(*[[name.encode() for name in NAMES]] * 4),
        examples=column(*rows),
        example_labels=column(*[[0, 2, 0]] * 4, kind=np.int32),
        example_weight=column(*[[0.25]] * 4, kind=np.float32),
    )
    # Rows with the same examples are one request, which encodes them once.
    assert [len(one.images) for one in requests] == [2, 2]
    expected = [SHOWN, SHOWN[::-1]]
    assert [one.examples for one in requests] == [
        Examples(own, (0, 2, 0), (0.25,)) for own in expected
    ]


def test_examples_labels_and_weights_belong_together(local: Local) -> None:
    for name, kind in (("examples", object), ("example_labels", int), ("example_weight", float)):
        alone = {name: column([png(0) if kind is object else 0], kind=kind)}
        with pytest.raises(TaskError, match=r"\[invalid_argument\] .* belong together"):
            read(local, image=column([png(0)]), labels=column([b"a"]), **alone)


def test_what_cancels_out_is_refused(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts_of(local)[0].astype(np.float32)
    label_set = LabelSet(("cat",), text[None], ("cat",), ("a {}",))
    monkeypatch.setattr(local, "images", lambda *_: -text[None])
    mixing = mix_examples(local.loaded, label_set, Examples((png(99),), (0,)), None)
    with pytest.raises(
        TaskError, match=r"^\[invalid_argument\] the examples of 'cat', or .* cancel"
    ):
        complete(mixing)


MANY = tuple(png(seed, 4, 4) for seed in range(MAX_EXAMPLES + 1))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (Examples((), ()), "no examples"),
        (Examples(SHOWN, (0, 1)), "3 examples and 2 example_labels"),
        (Examples(SHOWN[:1], (3,)), "example_labels has 3; there are labels 0 to 2"),
        (Examples(SHOWN[:1], (0,), (np.nan,)), "example_weight is nan; numbers from 0"),
        (Examples(SHOWN[:1], (0,), (0.5, 0.1)), "example_weight has 2 numbers for 3 labels"),
        (Examples(SHOWN[:1], (0,), ()), "example_weight is empty"),
        (Examples((SHOWN[0], b"nonsense"), (0, 1)), "example 2 of 2: 6 bytes are not an image"),
        (Examples(MANY, (0,) * len(MANY)), "129 examples in a request; at most 128"),
    ],
)
def test_bad_examples_are_refused_before_anything_is_encoded(
    local: Local, examples: Examples, message: str
) -> None:
    with pytest.raises(TaskError) as error:
        ask(local.loaded, examples)
    assert error.value.code == INVALID_ARGUMENT and message in error.value.message
    assert not local.calls


def test_pixels_of_examples_count_with_those_of_the_images(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.contract.images.MAX_REQUEST_PIXELS", 6 * 600)
    ask(local.loaded, Examples(SHOWN[:2], (0, 1)))
    with pytest.raises(TaskError, match=r"\[image_too_large\] the 7 images of the request have"):
        ask(local.loaded, Examples(SHOWN, (0, 1, 2)))


@pytest.fixture
def by_example(local: Local) -> LoadedRelease:
    """A release with label sets by example and by texts."""
    facts = {"shown": {"labels": 3, "examples": 2}, "texts": {"labels": 3}}
    loaded = local.changed(label_sets=facts)
    of_texts = complete(embed_labels(loaded, NAMES, TEMPLATES))
    examples = Examples(SHOWN[:2], (0, 2))
    mixed = complete(mix_examples(loaded, of_texts, examples, None))
    loaded.label_sets = {"texts": of_texts, "shown": replace(mixed, examples=examples)}
    local.calls.clear()
    return loaded


def test_a_label_set_by_example(local: Local, by_example: LoadedRelease) -> None:
    request = ClassifyRequest(IMAGES, Labels(label_set="shown"))
    found = complete(classify(by_example, request))
    assert [shape[0] for shape in local.calls] == [4]  # its export mixed the examples in
    shown = embeds(local, SHOWN)
    expected = texts_of(local)
    for place, own in ((0, shown[0]), (2, shown[1])):
        expected[place] = unit(expected[place] + own)
    check(local, found, expected)


@pytest.mark.parametrize("options", [{"multi_label": True}, {"calibrated": True}, {"unknown": 0.5}])
def test_scores_are_not_calibrated_for_labels_by_example(
    local: Local, by_example: LoadedRelease, options: dict[str, Any]
) -> None:
    examples = Examples(SHOWN[:1], (0,))
    for labels, given in ((Labels(NAMES), examples), (Labels(label_set="shown"), None)):
        request = ClassifyRequest(IMAGES, labels, examples=given, **options)
        with pytest.raises(TaskError, match="not calibrated for labels by example") as error:
            complete(classify(by_example, request))
        assert error.value.code == NOT_CALIBRATED
    assert not local.calls
    complete(classify(by_example, ClassifyRequest(IMAGES, Labels(label_set="texts"), **options)))


def test_label_sets_by_example_are_not_for_segment(by_example: LoadedRelease) -> None:
    assert complete(segment(by_example, SegmentRequest(png(0), Labels(label_set="texts"))))
    request = SegmentRequest(png(0), Labels(label_set="shown"))
    with pytest.raises(TaskError, match="'shown' has labels by example, which are for classify"):
        complete(segment(by_example, request))
