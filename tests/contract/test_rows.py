"""Rows of photos against figures by hand and a loop that makes the rows of each case anew."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from radapter_serve.contract import rows as module
from radapter_serve.contract.rows import (
    GRID,
    LEAST_KEPT,
    UNJUDGED,
    Judged,
    b_of,
    choose,
    choose_b,
    directions,
    judge,
    moved,
    rows,
    sums_of,
)

Array = NDArray[np.float64]
Places = NDArray[np.int64]


def unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def drawn(
    seed: int, labels: int, shown: int, photos: int, width: int = 8
) -> tuple[Array, Array, Places]:
    """Texts, photos that are near to their labels' texts in a cone of their own, and labels."""
    draw = np.random.default_rng(seed)
    texts = unit(draw.normal(size=(labels, width)))
    of_photos = np.concatenate([np.arange(shown), draw.integers(0, shown, photos - shown)])
    noise = draw.normal(size=(photos, width)) / width**0.5
    return texts, unit(texts[of_photos] + 1.5 * noise + draw.normal(size=width)), of_photos


def by_definition(texts: Array, photos: Array, labels: Places, b: float) -> Array:
    """The rows as the page of the method writes them, label by label."""
    means = {label: photos[labels == label].mean(0) for label in set(labels.tolist())}
    result = texts.copy()
    for label, mean in means.items():
        n = (labels == label).sum()
        away = mean - np.mean(list(means.values()), axis=0)
        result[label] = unit(texts[label] + b * n / (n + 2) * away)
    return result


def test_rows_by_hand() -> None:
    texts = np.eye(4)[:3]
    photos = np.array([[0.6, 0, 0, 0.8], [1, 0, 0, 0], [0, 0, 0, 1]])
    # Means (0.8, 0, 0, 0.4) of two photos and (0, 0, 0, 1) of one, and their mean (0.4, 0, 0, 0.7):
    # directions 2 / 4 · (0.4, 0, 0, -0.3) and 1 / 3 · (-0.4, 0, 0, 0.3).
    sums, counts = sums_of(photos, np.array([0, 0, 1]), 3)
    expected = [[1 + 0.8, 0, 0, -0.6], [-0.8 / 1.5, 1, 0, 0.6 / 1.5], [0, 0, 1, 0]]
    np.testing.assert_allclose(rows(texts, sums, counts, 4), unit(np.array(expected)), atol=1e-7)
    # A label has a b of its own; an infinite one leaves the text out.
    alone = np.array([[0.8, 0, 0, -0.6], [0, 1, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(rows(texts, sums, counts, [np.inf, 0, 1]), alone, atol=1e-7)


@pytest.mark.parametrize("b", [0.5, 8, np.inf])
@pytest.mark.parametrize(
    ("photos", "labels"),
    [
        pytest.param(np.zeros((0, 4)), [], id="no photo"),
        pytest.param(np.eye(4)[3:], [1], id="one label alone"),
        pytest.param(np.eye(4)[[3, 2, 3, 2]], [0, 0, 1, 1], id="equal photos of two labels"),
    ],
)
def test_photos_that_set_no_label_apart_move_none(
    photos: Array, labels: list[int], b: float
) -> None:
    texts = unit(np.random.default_rng(0).normal(size=(3, 4))).astype(np.float32)
    places = np.array(labels, int)
    np.testing.assert_array_equal(rows(texts, *sums_of(photos, places, 3), b), texts)
    assert choose_b(texts, photos, places).b == 0


def test_a_row_without_direction_keeps_its_text() -> None:
    texts = np.eye(2)
    np.testing.assert_array_equal(moved(texts, np.array([[-0.5, 0], [0, 1]]), 2), texts)


def test_sums_do_not_depend_on_when_a_photo_came() -> None:
    _, photos, labels = drawn(0, 3, 3, 200)
    small = photos.astype(np.float32)
    sums, counts = sums_of(small[:150], labels[:150], 3)
    for photo, label in zip(small[150:], labels[150:], strict=True):
        sums[label] += photo
        counts[label] += 1
    whole, numbers = sums_of(small, labels, 3)
    assert sums.tobytes() == whole.tobytes() and counts.tolist() == numbers.tolist()


CASES = st.tuples(st.integers(0, 99), st.integers(2, 5), st.integers(0, 3), st.integers(5, 20))


@settings(deadline=None, max_examples=25)
@given(CASES, st.floats(0, 8))
def test_rows_follow_from_their_definition(case: tuple[int, int, int, int], b: float) -> None:
    seed, shown, others, count = case
    texts, photos, labels = drawn(seed, shown + others, shown, count)
    result = rows(texts, *sums_of(photos, labels, len(texts)), b)
    np.testing.assert_allclose(result, by_definition(texts, photos, labels, b), atol=1e-5)
    # What all photos share, such as the cone of images, moves nothing.
    gap = np.random.default_rng(seed + 1).normal(size=photos.shape[1])
    shifted = rows(texts, *sums_of(photos + gap, labels, len(texts)), b)
    np.testing.assert_allclose(shifted, result, atol=1e-5)
    # The order of labels and photos tells nothing.
    order = np.random.default_rng(seed).permutation(len(texts))
    turned = np.argsort(order)[labels][::-1]
    again = rows(texts[order], *sums_of(photos[::-1], turned, len(texts)), b)
    np.testing.assert_allclose(again, result[order], atol=1e-5)


def left_out(
    texts: Array, photos: Array, labels: Places
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether photos are right by rows that are made anew without each, and without its label."""
    right = []
    kept = []

    def is_right(photo: int, without: NDArray[np.bool_], b: float) -> bool:
        made = by_definition(texts, photos[~without], labels[~without], b)
        return bool((made @ photos[photo]).argmax() == labels[photo])

    shown = len(set(labels.tolist()))
    for photo in range(len(photos)):
        of_label = labels == labels[photo]
        alone = np.arange(len(photos)) == photo
        if of_label.sum() > 1:
            right.append([is_right(photo, alone, b) for b in GRID])
        if 2 < shown < len(texts) and (texts @ photos[photo]).argmax() == labels[photo]:
            kept.append([is_right(photo, of_label, b) for b in GRID])
    first, second = (np.array(each, bool).reshape(-1, len(GRID)).T for each in (right, kept))
    return first, second


@pytest.mark.parametrize("block", [4, 1 << 15])
@pytest.mark.parametrize("shown", [2, 3, 5])
@pytest.mark.parametrize("others", [0, 3])
def test_photos_are_judged_without_them(
    monkeypatch: pytest.MonkeyPatch, block: int, shown: int, others: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    texts, photos, labels = drawn(shown, shown + others, shown, 40)
    labels[labels == 1] = 0
    labels[1] = 1  # the only photo of its label
    right, kept = left_out(texts, photos, labels)
    judged = judge(texts, photos, labels)
    np.testing.assert_array_equal(judged.right, right)
    np.testing.assert_array_equal(judged.kept, kept)
    assert judged.right.shape[1] == 39
    # Parts of the photos, as of folds, are the same as all at a time.
    parts = [judge(texts, photos, labels, np.arange(start, 40, 3)) for start in range(3)]
    together = Judged.joined(parts)
    order = np.concatenate([np.arange(start, 40, 3) for start in range(3)])
    order = order[order != 1]
    np.testing.assert_array_equal(together.right, right[:, order - (order > 1)])
    assert together.photos == 40 and choose(together).b == choose(judged).b


def test_a_label_of_two_photos_weighs_one_where_one_is_left_out() -> None:
    for seed in range(20):
        texts, photos, labels = drawn(seed, 5, 4, 9)
        right, _ = left_out(texts, photos, labels)
        np.testing.assert_array_equal(judge(texts, photos, labels).right, right)


def judged_as(shares: list[float], kept: list[float] | None = None, of: int = 100) -> Judged:
    """So many photos, of which a share is right and a share kept at each b: always the first."""
    first = np.arange(of) / of

    def wins(values: list[float]) -> NDArray[np.bool_]:
        return first < np.array([*values, *[values[-1]] * (len(GRID) - len(values))])[:, None]

    return Judged(of, wins(shares), wins(kept) if kept else np.zeros((len(GRID), 0), bool))


@pytest.mark.parametrize(
    ("judged", "expected"),
    [
        pytest.param(judged_as([0.5, 0.6, 0.9, 0.95, 0.96]), 1, id="the best"),
        pytest.param(judged_as([0.9, 0.9, 0.9, 0.9, 0.9]), 0, id="nothing is better"),
        pytest.param(judged_as([0.9, 0.8, 0.7]), 0, id="worse"),
        pytest.param(judged_as([0.5, 0.6, 0.7, 0.9], [1, 1, 0.95, 0.94]), 0.25, id="kept"),
        pytest.param(judged_as([0.5, 0.9], [1, 0.5]), 0, id="nothing is kept"),
    ],
)
def test_the_smallest_b_as_good_as_the_best_that_keeps_other_labels(
    judged: Judged, expected: float
) -> None:
    chosen = choose(judged)
    assert chosen.b == expected
    assert [step.b for step in chosen.curve] == list(GRID)
    best = max(chosen.curve, key=lambda step: step.score)
    assert best.behind == 0 and best.as_good
    for step in chosen.curve:
        # Of photos that are right with the best or with neither, p is the share that is lost.
        p = best.score - step.score
        assert step.behind == pytest.approx(p)
        assert step.error == pytest.approx((p * (1 - p) / 100) ** 0.5)


def test_a_smaller_b_is_as_good_within_one_standard_error() -> None:
    """It has 5 photos right that the best has wrong, which has 6 right that it has wrong."""
    right = judged_as([0.5, 0.9, 0.91]).right.copy()
    right[2:] = np.roll(right[2], 5)
    step = choose(Judged(100, right, right[:, :0])).curve[1]
    assert step.as_good and step.behind == pytest.approx(0.01)
    assert step.error == pytest.approx((0.11 - 0.01**2) ** 0.5 / 10)
    assert choose(Judged(100, right, right[:, :0])).b == GRID[1]


def test_single_photos_have_a_fixed_b_that_keeps_other_labels() -> None:
    texts, photos, _ = drawn(3, 6, 4, 4)
    assert choose_b(texts, photos, np.arange(4)) == module.ChosenB(UNJUDGED)
    few = judged_as([0.5], [1, 1, 1, LEAST_KEPT, 0.8])
    assert choose(Judged(100, few.right[:, :49], few.kept)).b == 0.5
    assert choose(Judged(100, few.right[:, :50], few.kept)).curve


def test_of_many_photos_some_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, photos, labels = drawn(0, 4, 4, 100)
    monkeypatch.setattr(module, "_FEWEST", 10)
    monkeypatch.setattr(module, "_MOST", 4 * 34)
    every = judge(texts, photos, labels, np.arange(0, 100, 3))
    some = judge(texts, photos, labels)
    np.testing.assert_array_equal(some.right, every.right)
    assert some.photos == 34


def test_a_larger_b_is_chosen_for_texts_that_fit_less() -> None:
    texts, photos, labels = drawn(2, 8, 8, 400, width=32)
    wrong = unit(texts + np.roll(texts, 1, axis=0) * [[0.9]])
    values = [choose_b(unit(texts + share * (wrong - texts)), photos, labels).b for share in (0, 1)]
    assert all(low <= high for low, high in pairwise(values)) and values[-1] > 0


def test_the_weight_of_a_request() -> None:
    assert [b_of(weight) for weight in (0, 0.5, 0.8, 1)] == pytest.approx([0, 1, 4, np.inf])
    direction = np.array([[0.0, 0.6]])
    for weight in (0.2, 0.8, 1):
        expected = unit((1 - weight) * np.array([[1.0, 0]]) + weight * direction)
        row = moved(np.array([[1.0, 0]]), direction, b_of(weight))
        np.testing.assert_allclose(row, expected, atol=1e-7)


def test_ten_thousand_photos_take_milliseconds() -> None:
    """A bound of 50 ms of one processor, of which a quiet machine takes a quarter."""
    texts, photos, labels = drawn(0, 20, 12, 10_000, width=512)
    small = photos.astype(np.float32)
    totals = sums_of(small, labels, 20)
    taken = []
    for _ in range(5):
        began = time.process_time()
        chosen = choose_b(texts, small, labels, totals=totals)
        rows(texts, *totals, chosen.b)
        taken.append(time.process_time() - began)
    assert min(taken) < 0.05
    assert directions(*totals).shape == (20, 512)
