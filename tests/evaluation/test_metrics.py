"""Metrics against loops; intervals and calibrated scores against scipy, draws and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation import metrics
from radapter_serve.evaluation.image_sets import common_nouns
from radapter_serve.evaluation.metrics import (
    average_precisions,
    calibration_error,
    caption_groups,
    classification_metrics,
    confusion,
    fit_confidence,
    fit_sigmoid,
    fit_temperature,
    mean_recall_interval,
    precision_interval,
    recalls_of,
    retrieval_ranks,
    segmentation_intervals,
    segmentation_metrics,
    true_ranks,
    wilson,
)


def best_first(scores: np.ndarray) -> list[int]:
    return sorted(range(len(scores)), key=lambda column: (-scores[column], column))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**32 - 1), st.booleans())
def test_average_precision_against_a_loop(n: int, seed: int, tied: bool) -> None:
    """The precision among those that score as high; an image that counts thrice is three images."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 3, (n, 4)) if tied else generator.normal(size=(n, 4))
    scores = drawn.astype(np.float32)
    truth = generator.random((n, 4)) < 0.4
    truth[:, 3] = False
    times = generator.integers(0, 4, (2, n)) + (np.arange(n) == 0)  # one image at least

    def by_a_loop(scores: np.ndarray, right: np.ndarray) -> float:
        precisions = [right[scores >= score].mean() for score in scores[right]]
        return float(np.mean(precisions)) if precisions else float("nan")

    precisions = average_precisions(scores, truth)
    assert np.isnan(precisions[3])
    for label in range(4):
        assert precisions[label] == pytest.approx(
            by_a_loop(scores[:, label], truth[:, label]), nan_ok=True
        )
    for draw, of in zip(times, average_precisions(scores, truth, times), strict=True):
        copies = np.repeat(np.arange(n), draw)
        assert of == pytest.approx(average_precisions(scores[copies], truth[copies]), nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_classification_against_a_loop(n: int, classes: int, seed: int, tied: bool) -> None:
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 3, (n, classes)) if tied else generator.normal(size=(n, classes))
    scores = drawn.astype(np.float32)
    labels = generator.integers(0, classes, n)
    metrics = classification_metrics(true_ranks(scores, labels), labels, classes)
    ordered = [best_first(row) for row in scores]
    hits = np.array([of[0] == label for of, label in zip(ordered, labels, strict=True)])
    recalls = [hits[labels == label].mean() for label in np.unique(labels)]
    expected = {"acc1": hits.mean(), "mean_per_class_recall": np.mean(recalls)}
    if classes > 5:
        among = [label in of[:5] for of, label in zip(ordered, labels, strict=True)]
        expected["acc5"] = np.mean(among)
    assert metrics == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.booleans())
def test_calibration_error_against_a_loop(n: int, seed: int, edges: bool) -> None:
    """An edge belongs to the bin below."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 16, n) / 15 if edges else generator.random(n)
    confidences: Any = drawn if edges else drawn.astype(np.float32)
    hits = generator.random(n) < drawn  # so that bins err to either side
    expected = 0.0
    for number in range(15):
        inside = (confidences > number / 15) & (confidences <= (number + 1) / 15)
        if number == 0:
            inside |= confidences == 0
        expected += abs(hits[inside].sum() - confidences[inside].sum(dtype=float)) / n
    assert calibration_error(confidences, hits) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(0, 2**32 - 1), st.booleans()
)
def test_retrieval_against_a_loop(captions: list[int], seed: int, tied: bool) -> None:
    generator = np.random.default_rng(seed)
    image_of = generator.permutation(np.repeat(np.arange(len(captions)), captions))
    width = 2 if tied else 8
    images, texts = (
        (
            generator.integers(0, 2, (n, width)) if tied else generator.normal(size=(n, width))
        ).astype(np.float32)
        for n in (len(captions), len(image_of))
    )
    recalls = recalls_of(retrieval_ranks(images, texts, image_of))
    to_image = [best_first(row) for row in texts @ images.T]
    to_text = [best_first(row) for row in images @ texts.T]
    for k in (1, 5, 10):
        hits = [image_of[text] in ordered[:k] for text, ordered in enumerate(to_image)]
        assert recalls[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))
        hits = [
            any(image_of[text] == image for text in ordered[:k])
            for image, ordered in enumerate(to_text)
        ]
        assert recalls[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))


def test_equal_captions_match_each_others_images_by_hand() -> None:
    captions = ["A dog.", "a  DOG", "a cat", "a dog .", "the tree"]
    assert caption_groups(captions).tolist() == [0, 0, 1, 0, 2]
    images = np.eye(4, dtype=np.float32)
    image_of = np.array([0, 1, 1, 2, 3])  # image 1 has two captions
    texts = np.array(
        [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]], np.float32
    )
    groups = caption_groups(captions)
    recalls = recalls_of(retrieval_ranks(images, texts, image_of, groups), (1, 2))
    # By text: dogs find the images 1 and 2, a dog each; cat and last dog miss; a tree finds 3.
    assert recalls["image_retrieval_recall@1"] == pytest.approx(3 / 5)
    # By image: 0 finds the first of equal texts, a dog; 1 and 2 their own; 3 a dog before the tree.
    assert recalls["text_retrieval_recall@1"] == pytest.approx(3 / 4)
    assert recalls["text_retrieval_recall@2"] == 1
    without_groups = recalls_of(retrieval_ranks(images, texts, image_of), (1,))
    assert without_groups == {"image_retrieval_recall@1": 1 / 5, "text_retrieval_recall@1": 1 / 4}


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(wrong: float) -> None:
    good = np.eye(3, dtype=np.float32)
    scores = good.copy()
    scores[1, 0] = wrong
    numbers = np.arange(3)
    with pytest.raises(RAdapterError, match="not finite"):
        true_ranks(scores, numbers)
    for embeds in ((scores, good), (good, scores)):
        with pytest.raises(RAdapterError, match="not finite"):
            retrieval_ranks(*embeds, numbers)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 5000), (7, 10), (4999, 5000)])
def test_intervals_of_a_share_and_of_a_mean_over_classes_of_one_image_are_scipys(
    hits: int, n: int
) -> None:
    expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    right = (np.arange(n) < hits).astype(int)
    for interval in (wilson(hits / n, n), mean_recall_interval(right, np.ones(n, int))):
        assert interval == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(
    ("classes", "images", "skill"), [(5, 2, "high"), (100, 1, "equal"), (50, None, "any")]
)
def test_a_mean_over_classes_is_covered_as_often_as_is_said(
    classes: int, images: int | None, skill: str
) -> None:
    """Drawn from classes whose recall is known; None has 1 to 7 images in a class."""
    generator = np.random.default_rng(classes)
    covered = []
    for _ in range(400):
        drawn = {
            "equal": np.full(classes, 0.8),
            "any": generator.random(classes),
            "high": generator.beta(18, 2, classes),
        }
        recall = drawn[skill]
        count = np.full(classes, images) if images else generator.integers(1, 8, classes)
        low, high = mean_recall_interval(generator.binomial(count, recall), count)
        covered.append(low <= recall.mean() <= high)
    assert np.mean(covered) > 0.917  # 95 % less three standard errors of 400
    if images != 1:
        assert np.mean(covered) < 0.985  # and not by an interval that holds everything


def test_the_interval_of_a_mean_over_classes_by_hand() -> None:
    """One of two images and two of three are right. Unbiased variances are 1/2 and 1/3, those of
    the recalls 1/4 and 1/9; the pooled variance, 7/12 x 5/12, has one of four degrees of freedom.
    """
    mean = 7 / 12
    pooled = mean * (1 - mean)
    variance = (3 * (1 / 4 + 1 / 9) + pooled * (1 / 2 + 1 / 3)) / 4
    n = 4 * pooled / variance
    z = scipy.stats.norm.ppf(0.975)
    for end in mean_recall_interval(np.array([1, 2]), np.array([2, 3])):
        # Wilson's ends are z standard errors of their own away from the mean.
        assert abs(end - mean) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_metrics_against_sets_of_pixels(classes: int, images: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    class_count = generator.integers(1, classes + 1)  # some classes may be nowhere
    truths = [generator.integers(-1, class_count, (3, 4)) for _ in range(images)]
    answers = [generator.integers(0, classes + 1, (3, 4)) for _ in range(images)]
    counts = np.zeros((classes, classes + 1), np.int64)
    for truth, answer in zip(truths, answers, strict=True):
        counts += confusion(truth[truth >= 0], answer[truth >= 0], classes)
    true = np.stack(truths)
    answered = np.where(true >= 0, np.stack(answers), -1)
    ious = []
    recalls = []
    for label in range(classes):
        intersection = ((true == label) & (answered == label)).sum()
        if union := ((true == label) | (answered == label)).sum():
            ious.append(intersection / union)
        if pixel_count := (true == label).sum():
            recalls.append(intersection / pixel_count)
    expected = {
        "miou": np.mean(ious) if ious else 0,
        "pixel_accuracy": (true == answered)[true >= 0].mean() if (true >= 0).any() else 0,
        "mean_class_accuracy": np.mean(recalls) if recalls else 0,
    }
    assert segmentation_metrics(counts) == pytest.approx(expected)


def test_images_are_drawn_for_segmentation() -> None:
    generator = np.random.default_rng(0)
    true = np.full((200, 2), 50)
    right = generator.binomial(true, 0.8)
    predicted = right + (true - right)[:, ::-1]  # what is not one class is the other
    sums = np.stack([right, true, predicted]).transpose(0, 1, 2)
    intervals = segmentation_intervals(sums)
    error = 1.96 * np.std(right.sum(1) / 100) / np.sqrt(200)
    mean = right.sum() / true.sum()
    assert intervals["pixel_accuracy"] == pytest.approx((mean - error, mean + error), abs=0.002)
    low, high = intervals["miou"]
    assert (
        low < (right.sum(0) / (true + predicted - right).sum(0)).mean() < high and high - low < 0.05
    )
    same = segmentation_intervals(np.repeat(sums[:, :1], 9, axis=1))
    assert all(high - low == pytest.approx(0) for low, high in same.values())
    assert segmentation_intervals(sums[:, :1]) == {}


def test_the_interval_of_a_mean_of_average_precisions_holds_the_truth() -> None:
    generator = np.random.default_rng(0)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        truth = generator.random((n, 3)) < [0.1, 0.3, 0.6]
        return (truth + generator.normal(size=(n, 3))).astype(np.float32), truth

    expected = average_precisions(*drawn(100_000)).mean()
    hits = 0
    for _ in range(30):
        interval = precision_interval(*drawn(150))
        assert interval is not None
        hits += interval[0] <= expected <= interval[1]
    assert hits >= 25  # of 28.5 on average; fewer once in 300 sets of 30
    assert precision_interval(*drawn(1)) is None


# Calibrated scores

N = 4000
CLASSES = 6


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, CLASSES)).astype(np.float32) * 3


def drawn(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Labels that are right as often as softmax(logits / temperature) says."""
    shares = torch.softmax(torch.tensor(logits) / temperature, 1)
    return torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(1))[:, 0].numpy()


def least(loss: Callable[[torch.Tensor], torch.Tensor], start: list[float]) -> np.ndarray:
    """The point at which a function is least, by torch's L-BFGS."""
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-11, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimizer.step(closure)
    return point.detach().numpy()


def test_the_temperature_is_the_best_for_whether_the_best_label_is_right(
    logits: np.ndarray,
) -> None:
    """No temperature is right for all labels here: a third of them are drawn at random."""
    truth = np.where(np.arange(N) % 3, drawn(logits, 1.0), np.arange(N) // 3 % CLASSES)
    values = torch.tensor(logits, dtype=torch.float64)
    hits = torch.tensor(logits.argmax(axis=1) == truth, dtype=torch.float64)
    [inverse] = least(
        lambda point: binary_cross_entropy(torch.softmax(values * point, 1).amax(1), hits), [1.0]
    )
    assert fit_temperature(logits, truth) == pytest.approx(1 / inverse, rel=1e-4)


def test_the_sigmoid_is_that_of_a_logistic_regression(logits: np.ndarray) -> None:
    cosines = logits / 30 + 0.2
    truth = drawn(logits, 1.0)
    right = np.eye(CLASSES)[truth]
    positive = right.sum()
    negative = (1 - right).sum()
    target = torch.tensor(np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2)))
    values = 30 * (torch.tensor(cosines, dtype=torch.float64) - 0.2)
    expected = least(
        lambda line: binary_cross_entropy_with_logits(values * line[0] + line[1], target), [0, 0]
    )
    scale, bias = fit_sigmoid(cosines, truth)
    assert scale == pytest.approx(30 * expected[0], rel=1e-4)
    assert bias == pytest.approx(expected[1] - 6 * expected[0], rel=1e-4)


@pytest.mark.parametrize("fit", [fit_sigmoid, fit_temperature])
def test_many_pairs_are_fitted_by_some_images(
    logits: np.ndarray, fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = drawn(logits, 1.0)
    half_fit, full_fit = fit(logits[::2], truth[::2]), fit(logits, truth)
    monkeypatch.setattr(metrics, "MAX_PAIRS", N * CLASSES // 2)
    assert fit(logits, truth) == half_fit != full_fit


def test_each_half_is_judged_by_the_fit_of_the_other(logits: np.ndarray) -> None:
    """Every second image is much surer, so that no half is right by the other's fit."""
    surer = np.arange(N) % 2 == 1
    factors: np.ndarray = np.where(surer, 1.0, 0.2).astype(np.float32)
    logits = logits * factors[:, None]
    truth = np.where(surer, drawn(logits, 3.0), drawn(logits, 0.3))
    after = torch.zeros(N, dtype=torch.float64)
    pairs = torch.zeros(N, CLASSES, dtype=torch.float64)
    for half, other_half in ((0, 1), (1, 0)):
        temperature = fit_temperature(logits[other_half::2], truth[other_half::2])
        assert temperature is not None
        values = torch.tensor(logits[half::2]).double()
        after[half::2] = torch.softmax(values / temperature, 1).amax(1)
        scale, bias = fit_sigmoid(logits[other_half::2] / 100, truth[other_half::2])
        pairs[half::2] = torch.sigmoid(values / 100 * scale + bias)
    hits = logits.argmax(1) == truth
    right = np.eye(CLASSES, dtype=bool)[truth]
    confidence = fit_confidence(logits / 100, truth, 100.0, None, "photos")
    assert (confidence.dataset, confidence.n, confidence.classes) == ("photos", N, CLASSES)
    assert confidence.temperature == pytest.approx(fit_temperature(logits, truth))
    plain = torch.softmax(torch.tensor(logits).double(), 1).amax(1)
    for error, sure, outcome in (
        (confidence.ece_before, plain, hits),
        (confidence.ece_after, after, hits),
        (confidence.label_ece, pairs, right),
    ):
        expected = calibration_error(sure.numpy().ravel(), outcome.ravel())
        assert error == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("n", "reach"), [(100, 95), (119, 114), (120, 114), (1010, 960)])
def test_the_least_score_keeps_95_of_100_images_and_says_what_else_reaches_it(
    logits: np.ndarray, n: int, reach: int
) -> None:
    cosines = logits[:n] / 20
    truth = drawn(logits, 1.0)[:n]
    confidence = fit_confidence(cosines, truth, 20.0, None, "photos")
    true_scores = cosines[np.arange(n), truth]
    assert confidence.min_score in true_scores
    assert (true_scores >= confidence.min_score).sum() == reach  # the least number of 95 % or more
    false_scores = np.where(np.arange(CLASSES) == truth[:, None], -np.inf, cosines)
    assert (
        confidence.false_answers
        == (false_scores >= confidence.min_score).any(axis=0).sum() / CLASSES
    )


def test_models_without_a_temperature(logits: np.ndarray) -> None:
    biased = fit_confidence(logits / 100, drawn(logits, 1.0), 100.0, -9.0, "photos")
    assert biased.temperature is None and biased.ece_after is not None
    assert biased.ece_after < biased.ece_before
    # Colder is always better if no image is wrong, and warmer if none is right.
    right = fit_confidence(logits / 100, logits.argmax(axis=1), 100.0, None, "photos")
    assert right.temperature is None and right.ece_after is None and right.scale > 0
    assert fit_temperature(logits, logits.argmin(axis=1)) is None


@pytest.mark.parametrize("shape", [(99, 5), (200, 1)])
def test_too_few_images_or_labels(shape: tuple[int, int]) -> None:
    with pytest.raises(RAdapterError, match="too few for calibrated scores"):
        cosines = np.zeros(shape, np.float32)
        fit_confidence(cosines, np.zeros(shape[0], np.int64), 100.0, None, "photos")


def test_the_nouns_are_every_third_of_imagenets_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    names = common_nouns(["something else"])
    assert names == list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES[::3])) and len(names) == 333
    assert common_nouns(open_clip.IMAGENET_CLASSNAMES) == []
    for name, left_out in (
        ("a big Toucan.", ["toucan"]),
        ("toucans", []),  # no word of it
        ("shark", ["tiger shark"]),
        ("SEA-LION", ["sea lion", "lion"]),
        ("!", []),
    ):
        nouns = common_nouns(["something else", name])
        assert [noun for noun in names if noun not in nouns] == left_out
