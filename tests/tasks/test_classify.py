"""`classify` in this process: scores against formulas, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract.embeddings import Point
from radapter_serve.contract.errors import INVALID_ARGUMENT, NOT_CALIBRATED, TaskError
from radapter_serve.contract.rows import choose_b
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.labels import MAX_EXAMPLES, Examples, LabelSet
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.release.release import LabelSetFacts
from radapter_serve.tasks.classify import (
    ClassifyRequest,
    Ranking,
    ScoreRule,
    classify,
    with_rows,
)
from radapter_serve.tasks.embed import (
    EmbedImagesRequest,
    Labels,
    embed_images,
    embed_labels,
)
from radapter_serve.tasks.segment import SegmentRequest, segment
from radapter_serve.tasks.table import TASKS, forms
from tests.helpers.small_release import CONFIDENCE, LABELS, SIZE, Local, png, together

NAMES = ("cat", "dog", "bird, fowl", "fish", "a man", "tree", "house")
TEMPLATES = ["a photo of a {}."]
IMAGES = [png(seed) for seed in range(6)]


def ask(
    loaded: LoadedRelease,
    images: Sequence[bytes] = IMAGES,
    labels: Labels = Labels(NAMES),  # noqa: B008
    alpha: float | None = None,
    **options: Any,
) -> list[Ranking]:
    request = ClassifyRequest(images, labels, point=Point(alpha=alpha), **options)
    return complete(classify(loaded, request))


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


def check(rankings: Sequence[Ranking], scores: np.ndarray, names: Sequence[str]) -> None:
    """Each row has as many of the best labels as it has."""
    for ranking, row in zip(rankings, scores, strict=True):
        best = np.argsort(-row)[: len(ranking.labels)]
        assert list(ranking.labels) == [names[place] for place in best]
        np.testing.assert_allclose(ranking.scores, row[best], rtol=1e-4)


def test_the_headers_of_all_images_are_read_before_the_first_is_decoded(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.contract.images.MAX_REQUEST_PIXELS", 4600)
    monkeypatch.setattr("radapter_serve.contract.preprocess.LARGE_PIXELS", 1_000_000)
    monkeypatch.setattr(
        "radapter_serve.contract.preprocess.decode_into", lambda *_: pytest.fail("decoded")
    )
    data = [png(seed) for seed in range(8)]  # 600 pixels each
    # The last is 16 x 64,000 pixels when it is resized.
    for asked, message in (
        (data, "have 4800 pixels together; at most 4600"),
        ([data[0], b"nonsense"], "image 2 of 2: 6 bytes are not an image"),
        ([data[0], png(0, 4000, 1)], "image of 4000 x 1, resized,"),
    ):
        for task in (
            embed_images(local.loaded, EmbedImagesRequest(asked)),
            classify(local.loaded, ClassifyRequest(asked, Labels(["a"]))),
        ):
            with pytest.raises(TaskError, match=message):
                complete(task)
    assert not local.calls


def test_templates_of_the_request_and_a_label_set_of_the_release(local: Local) -> None:
    embeds = complete(embed_images(local.loaded, EmbedImagesRequest(IMAGES))).astype(np.float64)
    templates = ["one {}", "two {}"]
    of_request = complete(embed_labels(local.loaded, NAMES, templates))
    rankings = ask(local.loaded, labels=Labels(NAMES, templates=templates), top_k=100)
    check(rankings, softmax(10 * embeds @ of_request.embeds.T), of_request.labels)
    of_release = complete(embed_labels(local.loaded, LABELS, ["a {}"]))
    local.calls.clear()
    rankings = ask(local.loaded, labels=Labels(label_set="colours"))
    assert [len(ranking.labels) for ranking in rankings] == [4] * 6
    check(rankings, softmax(10 * embeds @ of_release.embeds.T), of_release.labels)
    assert local.calls == [(6, SIZE, SIZE, 3)]  # its labels were embedded when it was made


ALL: dict[str, Any] = {"multi_label": True, "threshold": 0.0}
# Of the small release the scale is 10, the temperature 2, and those of a label alone 6 and -1.
SIGMOID: dict[str, Any] = {"logit_bias": -3.0, "confidence": replace(CONFIDENCE, temperature=None)}
SCORES: list[tuple[dict[str, Any], dict[str, Any], Callable[[np.ndarray], np.ndarray], int]] = [
    ({}, {}, lambda c: softmax(10 * c), 5),
    ({}, {"top_k": 100}, lambda c: softmax(10 * c), 7),
    ({}, {"calibrated": True, "top_k": 7}, lambda c: softmax(5 * c), 7),
    ({}, ALL, lambda c: sigmoid(6 * c - 1), 7),
    ({}, {**ALL, "top_k": 2}, lambda c: sigmoid(6 * c - 1), 2),
    (SIGMOID, ALL, lambda c: sigmoid(6 * c - 1), 7),
    (SIGMOID, {"top_k": 7}, lambda c: sigmoid(10 * c - 3), 7),
    (SIGMOID, {"top_k": 7, "calibrated": True}, lambda c: sigmoid(6 * c - 1), 7),
]


@pytest.mark.parametrize(("facts", "options", "expected", "count"), SCORES)
def test_scores_are_those_of_the_formula(
    local: Local,
    cosines: np.ndarray,
    label_set: LabelSet,
    facts: dict[str, Any],
    options: dict[str, Any],
    expected: Callable[[np.ndarray], np.ndarray],
    count: int,
) -> None:
    rankings = ask(local.changed(**facts), **options)
    assert [len(ranking.labels) for ranking in rankings] == [count] * 6
    check(rankings, expected(cosines), label_set.labels)
    if "multi_label" in options:  # each is scored as it would be if it were the only one
        [alone] = ask(local.changed(**facts), IMAGES[:1], Labels(["cat"]), **options)
        assert alone.scores[0] == pytest.approx(expected(cosines)[0, 0], rel=1e-5)


def test_labels_below_the_threshold_are_left_out(
    local: Local, cosines: np.ndarray, label_set: LabelSet
) -> None:
    scores = sigmoid(6.0 * cosines - 1.0)
    counts = (scores >= 0.5).sum(axis=1).tolist()
    assert len(set(counts)) > 1
    cases: list[dict[str, Any]] = [{}, {"threshold": 0.5}]
    for options in cases:
        rankings = ask(local.loaded, multi_label=True, **options)
        assert [len(ranking.labels) for ranking in rankings] == counts
        check(rankings, scores, label_set.labels)
    none = ask(local.loaded, multi_label=True, threshold=1.0)
    assert not any(ranking.labels for ranking in none)
    # On the wire, a row has one label at least.
    outputs = TASKS["classify"].write([none])
    assert outputs["label"].tolist() == [[b""]] * 6 and outputs["score"].tolist() == [[0]] * 6


@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, None), (1000.0, None), (1000.0, 900.0)])
def test_labels_are_ranked_by_their_cosines_and_of_equal_ones_the_first_comes_first(
    top_k: int | None, scale: float, bias: float | None
) -> None:
    """In float32 a sigmoid is 1 for all logits above 17, and a softmax is 0 for all that are far
    below the best.
    """
    values = np.random.default_rng(0).integers(0, 4, 50).astype(np.float32) / 4
    names = tuple(map(str, range(50)))
    ranking = ScoreRule(top_k, scale, bias).ranking(values, LabelSet(names, values, names, ()))
    expected = sorted(range(50), key=lambda place: -values[place])[:top_k]
    assert [int(name) for name in ranking.labels] == expected
    logits = scale * (values[None].astype(np.float64) - 1)
    scores = softmax(logits) if bias is None else sigmoid(logits + scale + bias)
    np.testing.assert_allclose(ranking.scores, scores[0, expected], rtol=1e-5, atol=1e-9)


def test_an_image_that_no_label_fits_is_unknown(local: Local, cosines: np.ndarray) -> None:
    best = sigmoid(6.0 * cosines - 1.0).max(1)
    least = float(np.median(best))
    is_unknown = best < np.float32(least)
    assert is_unknown.any() and not is_unknown.all()
    cases: list[dict[str, Any]] = [{}, {"calibrated": True}]
    for options in cases:
        plain = ask(local.loaded, **options)
        rankings = ask(local.loaded, unknown=least, **options)
        for row, ranking in enumerate(rankings):
            if is_unknown[row]:
                assert list(ranking.labels) == ["unknown"]
                assert ranking.scores[0] == pytest.approx(1 - best[row], abs=1e-5)
            else:
                assert ranking.labels == plain[row].labels
                np.testing.assert_array_equal(ranking.scores, plain[row].scores)


def test_a_score_that_equals_its_limit_is_enough() -> None:
    """In float32 a sigmoid ends at 1."""
    cosines = np.array([1, -1], np.float32)
    label_set = LabelSet(("cat", "dog"), cosines, ("cat", "dog"), ())
    for rule in (
        ScoreRule(None, 100.0, 0.0, threshold=1.0),
        ScoreRule(1, 100.0, None, unknown=1.0, sigmoid=(100.0, 0.0)),
    ):
        ranking = rule.ranking(cosines, label_set)
        assert list(ranking.labels) == ["cat"] and ranking.scores.tolist() == [1.0]


@pytest.mark.parametrize("options", [{"multi_label": True}, {"calibrated": True}, {"unknown": 0.5}])
def test_calibrated_scores_are_for_the_alpha_of_the_release_alone(
    local: Local, options: dict[str, Any]
) -> None:
    """An alpha that is as near as float32 has it is another one, too."""
    loaded = local.changed(alpha=0.3, dynamic_alpha=True)
    exported_alpha = np.float32(0.3)
    for same in (None, 0.3, float(exported_alpha)):
        ask(loaded, IMAGES[:1], alpha=same, **options)
    with pytest.raises(TaskError, match=r"calibrated at alpha 0.3, not at 0\.25"):
        ask(loaded.at(0.25), IMAGES[:1], **options)  # a copy at another α is not calibrated either
    local.calls.clear()
    for near in (*(float(np.nextafter(exported_alpha, np.float32(end))) for end in (0, 1)), 0.25):
        with pytest.raises(TaskError, match=r"calibrated at alpha 0.3, not at 0\.") as error:
            ask(loaded, IMAGES[:1], alpha=near, **options)
        assert error.value.code == NOT_CALIBRATED
    assert not local.calls


WHY = "export one with radapter-export --validation DATA"
UNFITTED: dict[str, Any] = {"confidence": None}
COLD: dict[str, Any] = {"confidence": replace(CONFIDENCE, temperature=None)}


@pytest.mark.parametrize(
    ("facts", "options", "code", "message"),
    [
        ({}, {"labels": Labels()}, "no_labels", "give labels, or a label_set of this release: col"),
        ({}, {"labels": Labels(["a", " "])}, INVALID_ARGUMENT, "label 2 of 2 is empty"),
        ({}, {"labels": Labels(["a", "a"])}, INVALID_ARGUMENT, "label 2, 'a', is the same as lab"),
        ({}, {"labels": Labels(["a" * 1001])}, INVALID_ARGUMENT, "a label of 1001 characters"),
        ({}, {"labels": Labels(["a"], templates=["none"])}, INVALID_ARGUMENT, "has no {}"),
        ({}, {"labels": Labels(label_set="c" * 10_001)}, "unknown_label_set", "there are: colours"),
        ({}, {"labels": Labels(list(map(str, range(20_001))))}, INVALID_ARGUMENT, "20001 prompts"),
        ({}, {"top_k": 0}, INVALID_ARGUMENT, "top_k is 0; allowed: whole numbers"),
        ({}, {"alpha": np.nan}, INVALID_ARGUMENT, "alpha is nan"),
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


def column(*rows: Any, kind: Any = object) -> np.ndarray:
    return np.array(rows, kind)


def test_rows_of_a_request_may_differ_in_their_options(local: Local) -> None:
    """On the wire each row has all of them; answers are as wide as that with most labels."""
    task = TASKS["classify"]
    inputs = {
        "image": column([png(0)], [png(1)], [png(2)], [png(3)]),
        "labels": column([b"x", b"y", b"z"], [b"x", b"y", b"z"], [b"a", b"b", b"c"], [b"a"] * 3),
        "top_k": column([2], [2], [3], [1], kind=np.int32),
    }
    inputs["labels"][3] = [b"d", b"e", b"f"]
    task.check("classify", forms(inputs), 64)
    requests = task.read(local.loaded, inputs, lambda name: True)
    assert [len(request.images) for request in requests] == [2, 1, 1]
    run = task.make(local.loaded, lambda: [], 0)
    outputs = task.values(7, together([run(request, None) for request in requests]))
    assert outputs["label"].shape == outputs["score"].shape == (4, 3)
    for row, count in enumerate((2, 2, 3, 1)):
        names = [name.decode() for name in inputs["labels"][row]]
        [alone] = ask(local.loaded, [png(row)], Labels(names), top_k=count)
        wide = [*alone.labels, *[""] * (3 - count)]
        assert [name.decode() for name in outputs["label"][row]] == wide
        np.testing.assert_allclose(outputs["score"][row, :count], alone.scores, rtol=1e-5)
        assert not outputs["score"][row, count:].any()
        receipt = json.loads(outputs["receipt"][row, 0])
        assert receipt == {
            "release": 7,
            "adapter": None,
            "adapter_digest": None,
            "alpha": local.loaded.release.alpha,
        }


def test_prompts_are_counted_over_all_rows_of_a_request(local: Local) -> None:
    def rows(lists: list[list[str]]) -> dict[str, np.ndarray]:
        names = [[name.encode() for name in labels] for labels in lists]
        return {"image": column(*[[png(0)]] * len(lists)), "labels": column(*names)}

    lists = [[f"{row} {index}" for index in range(7_000)] for row in range(3)]
    with pytest.raises(TaskError, match=r"\[invalid_argument\] 21000 prompts"):
        read(local, **rows(lists))
    # A list that some rows have counts once.
    assert len(read(local, **rows([lists[0], lists[1], lists[0], lists[0], lists[1]]))) == 4


# Labels by example

SHOWN = tuple(png(seed, kind="JPEG") for seed in range(10, 13))
SOME = ("cat", "dog", "bird")
FOUR = IMAGES[:4]


def shown_by(loaded: LoadedRelease, examples: Examples) -> list[Ranking]:
    return complete(classify(loaded, ClassifyRequest(FOUR, Labels(SOME), examples=examples)))


def embeds(local: Local, images: Sequence[bytes]) -> np.ndarray:
    embeds = complete(embed_images(local.loaded, EmbedImagesRequest(images)))
    return embeds.astype(np.float64)


def texts_of(local: Local) -> np.ndarray:
    return complete(embed_labels(local.loaded, SOME, TEMPLATES)).embeds.astype(np.float64)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def towards(shown: np.ndarray, labels: Sequence[int]) -> dict[int, np.ndarray]:
    """What sets the examples of each label apart, by radapter_serve/contract/rows.py's formula."""
    places = np.array(labels)
    means = {label: shown[places == label].mean(0) for label in set(labels)}
    middle = np.mean(list(means.values()), axis=0)
    counts = np.bincount(places)
    return {k: counts[k] / (counts[k] + 2) * (mean - middle) for k, mean in means.items()}


@pytest.mark.parametrize("weights", [(0.0,), (0.3,), (0.25, 0.9, 1.0)])
def test_labels_move_to_what_sets_their_examples_apart(
    local: Local, weights: tuple[float, ...]
) -> None:
    of_label = np.broadcast_to(weights, 3)
    expected = texts_of(local)
    for label, direction in towards(embeds(local, SHOWN), (0, 2, 0)).items():
        share = of_label[label]
        expected[label] = unit((1 - share) * expected[label] + share * direction)
    examples = Examples(SHOWN, (0, 2, 0), weights)
    check(shown_by(local.loaded, examples), softmax(10 * embeds(local, FOUR) @ expected.T), SOME)


def test_without_a_weight_leaving_each_example_out_chooses_it(local: Local) -> None:
    many = tuple(png(number, 4, 4) for number in range(40))
    # Each is an example of the label whose text is the last to fit.
    shown = np.concatenate([embeds(local, many[start : start + 10]) for start in (0, 10, 20, 30)])
    labels = tuple((shown @ texts_of(local).T).argmin(axis=1).tolist())
    chosen = choose_b(texts_of(local), shown, np.array(labels)).b
    assert chosen > 0
    weighed = Examples(many, labels, (chosen / (1 + chosen),))
    for left, right in zip(
        shown_by(local.loaded, Examples(many, labels)),
        shown_by(local.loaded, weighed),
        strict=True,
    ):
        assert left.labels == right.labels
        np.testing.assert_allclose(left.scores, right.scores, rtol=1e-4)


@pytest.mark.parametrize("weights", [None, (0.9,)])
def test_examples_of_one_label_alone_move_nothing(
    local: Local, weights: tuple[float, ...] | None
) -> None:
    alone = shown_by(local.loaded, Examples(SHOWN, (1, 1, 1), weights))
    check(alone, softmax(10 * embeds(local, FOUR) @ texts_of(local).T), SOME)


def test_examples_are_encoded_in_parts(local: Local) -> None:
    many = tuple(png(number, 4, 4) for number in range(40))
    label_set = complete(embed_labels(local.loaded, SOME, ["{}"]))
    labels = tuple(number % 3 for number in range(42))
    # One is an example of two labels; the other, given twice for one, counts once.
    examples = Examples((*many, many[0], many[2]), (*labels[:40], 1, 2), (0.5,))
    local.calls.clear()
    moved = complete(with_rows(local.loaded, label_set, examples, local.loaded.place()))
    assert [shape[0] for shape in local.calls] == [16, 16, 8]
    alone = np.concatenate([embeds(local, [image]) for image in examples.images[:41]])
    for label, direction in towards(alone, examples.labels[:41]).items():
        expected = unit(label_set.embeds[label] + direction)
        np.testing.assert_allclose(moved.embeds[label], expected, atol=1e-6)


def test_a_file_of_the_first_version_mixes_means_as_it_did(local: Local) -> None:
    """As (1 - w) of the text and w of the mean at unit length, also where one label has examples,
    and where an example is given twice.
    """
    label_set = complete(embed_labels(local.loaded, SOME, TEMPLATES))
    shown = (*SHOWN, SHOWN[0])
    places = (0, 2, 0, 0)
    examples = Examples(shown, places, (0.25, 0.9, 1.0), of_means=True)
    mixed = complete(with_rows(local.loaded, label_set, examples, local.loaded.place()))
    expected = texts_of(local)
    of_shown = embeds(local, shown)
    expected[0] = unit(0.75 * expected[0] + 0.25 * unit(of_shown[[0, 2, 3]].mean(0)))
    expected[2] = of_shown[1]
    np.testing.assert_allclose(mixed.embeds, expected, atol=1e-6)


def read(local: Local, **inputs: np.ndarray) -> list[ClassifyRequest]:
    return TASKS["classify"].read(local.loaded, inputs, lambda name: True)


def test_rows_have_examples_of_their_own_or_those_of_the_row_before(local: Local) -> None:
    rows = [SHOWN, [b""] * 3, SHOWN[::-1], [b""] * 3]
    requests = read(
        local,
        image=column(*[[image] for image in FOUR]),
        labels=column(*[[name.encode() for name in SOME]] * 4),
        examples=column(*rows),
        example_labels=column(*[[0, 2, 0]] * 4, kind=np.int32),
        example_weight=column(*[[0.25]] * 4, kind=np.float32),
    )
    # Rows with the same examples are one request, which encodes them once.
    assert [len(request.images) for request in requests] == [2, 2]
    expected = [SHOWN, SHOWN[::-1]]
    assert [request.examples for request in requests] == [
        Examples(images, (0, 2, 0), (0.25,)) for images in expected
    ]


def test_examples_labels_and_weights_belong_together(local: Local) -> None:
    for name, kind in (("examples", object), ("example_labels", int), ("example_weight", float)):
        alone = {name: column([png(0) if kind is object else 0], kind=kind)}
        with pytest.raises(TaskError, match=r"\[invalid_argument\] .* belong together"):
            read(local, image=column([png(0)]), labels=column([b"a"]), **alone)


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
        shown_by(local.loaded, examples)
    assert error.value.code == INVALID_ARGUMENT and message in error.value.message
    assert not local.calls


def test_pixels_of_examples_count_with_those_of_the_images(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.contract.images.MAX_REQUEST_PIXELS", 6 * 600)
    shown_by(local.loaded, Examples(SHOWN[:2], (0, 1)))
    with pytest.raises(TaskError, match=r"\[image_too_large\] the 7 images of the request have"):
        shown_by(local.loaded, Examples(SHOWN, (0, 1, 2)))


@pytest.fixture
def by_example(local: Local) -> LoadedRelease:
    """A release with label sets by example and by texts."""
    texts = LabelSetFacts(3, TEMPLATES, "sha256:7")
    facts = {"shown": replace(texts, examples=2), "texts": texts}
    loaded = local.changed(label_sets=facts)
    of_texts = complete(embed_labels(loaded, SOME, TEMPLATES))
    examples = Examples(SHOWN[:2], (0, 2), (0.5,))
    mixed = complete(with_rows(loaded, of_texts, examples, loaded.place()))
    loaded.label_sets = {"texts": of_texts, "shown": replace(mixed, examples=examples)}
    local.calls.clear()
    return loaded


def test_a_label_set_by_example(local: Local, by_example: LoadedRelease) -> None:
    request = ClassifyRequest(FOUR, Labels(label_set="shown"))
    rankings = complete(classify(by_example, request))
    assert [shape[0] for shape in local.calls] == [4]  # its export moved the labels
    expected = texts_of(local)
    for label, direction in towards(embeds(local, SHOWN[:2]), (0, 2)).items():
        expected[label] = unit(expected[label] + direction)
    check(rankings, softmax(10 * embeds(local, FOUR) @ expected.T), SOME)


@pytest.mark.parametrize("options", [{"multi_label": True}, {"calibrated": True}, {"unknown": 0.5}])
def test_scores_are_not_calibrated_for_labels_by_example(
    local: Local, by_example: LoadedRelease, options: dict[str, Any]
) -> None:
    examples = Examples(SHOWN[:1], (0,))
    for labels, request_examples in ((Labels(SOME), examples), (Labels(label_set="shown"), None)):
        request = ClassifyRequest(FOUR, labels, examples=request_examples, **options)
        with pytest.raises(TaskError, match="not calibrated for labels by example") as error:
            complete(classify(by_example, request))
        assert error.value.code == NOT_CALIBRATED
    assert not local.calls
    complete(classify(by_example, ClassifyRequest(FOUR, Labels(label_set="texts"), **options)))


def test_label_sets_by_example_are_not_for_segment(by_example: LoadedRelease) -> None:
    assert complete(segment(by_example, SegmentRequest(png(0), Labels(label_set="texts"))))
    request = SegmentRequest(png(0), Labels(label_set="shown"))
    with pytest.raises(TaskError, match="'shown' has labels by example, which are for classify"):
        complete(segment(by_example, request))
