"""Pictures of results, read from matplotlib's own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from radapter_serve.evaluation.alpha_choice import choose
from radapter_serve.evaluation.plots import (
    draw_choice,
    plot_alpha_curve,
    plot_calibration,
    plot_confusion,
)
from radapter_serve.evaluation.rows import Bin, ClassFigures
from tests.helpers.a_row import a_row


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, in place of their files."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    return figures


def test_the_curve_has_another_method_and_what_is_kept(drawn: list[Any]) -> None:
    rows = [{"alpha": a, "a": 50 + 20 * a, "b": 40 - 15 * a * a} for a in (0.0, 0.5, 1.0)]
    other = [{"alpha": a, "a": 50 + 10 * a, "b": 40 - 20 * a} for a in (0.0, 1.0)]
    kept = {1.0: 71.0, 0.0: 100.0}
    plot_alpha_curve(rows, ["a"], ["b"], "with.png", beside={"WiSE-FT": other}, kept=kept)
    plot_alpha_curve(rows, ["a"], [], "alone.png")
    curve, of_alpha, right = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in curve.get_lines()}
    assert lines == {
        "R-Adapter": [[50, 40], [60, 36.25], [70, 25]],
        "WiSE-FT": [[50, 40], [60, 20]],
    }
    (alone,) = drawn[1].axes
    for axes in (of_alpha, alone):
        assert axes.get_lines()[0].get_xydata().tolist() == [[0, 50], [0.5, 60], [1, 70]]
    assert right.get_lines()[0].get_xydata().tolist() == [[0, 100], [1, 71]]
    assert right.get_ylim()[0] < 71 and right.get_ylim()[1] > 100


def test_a_choice_is_marked_in_the_picture(drawn: list[Any]) -> None:
    rows = [
        a_row(share=share, alpha=alpha, intervals={"acc1": (share - 0.15, 1.0)})
        for alpha, share in {0.0: 0.2, 0.3: 0.9, 0.5: 0.9, 1.0: 1.0}.items()
    ]
    draw_choice(choose(rows, 0.5), Path())
    axes = drawn[0].axes[0]
    marks = {str(line.get_label()): line for line in axes.get_lines()}
    assert marks["auto: α = 0.3"].get_xdata() == [0.3, 0.3]
    assert {"smallest as good as the best: α = 0.3", "best: α = 1"} < set(marks)
    assert marks["the base's level"].get_ydata() == pytest.approx([20, 20])
    box = axes.collections[0].get_paths()[0].get_extents()
    assert (box.y0, box.y1) == pytest.approx((5, 115))


@pytest.mark.parametrize(
    ("confusion", "dense", "kind", "shares"),
    [
        ([[3, 1, 0], [4, 0, 0]], None, "recall", [[75, 25], [100, 0]]),
        ([[3, 1, 0], [3, 0, 1]], "naclip", "iou", [[75, 25, 0], [75, 0, 25]]),
    ],
)
def test_a_confusion_is_shown_in_per_cent_of_the_true_class(
    confusion: Any, dense: str | None, kind: str, shares: Any, drawn: list[Any]
) -> None:
    classes = [ClassFigures("cat", 4, 0.75, 0.75), ClassFigures("dog", 4, None, None)]
    plot_confusion(a_row(confusion=confusion, per_class=classes, dense=dense), "own.png")
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), shares)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {
        (column, line): str(share)
        for line, of in enumerate(shares)
        for column, share in enumerate(of)
    }
    answered = [label.get_text() for label in axes.get_xticklabels()]
    assert answered == ["cat", "dog", "none"][: len(shares[0])]
    true = [label.get_text() for label in axes.get_yticklabels()]
    assert true == [f"cat, n 4, {kind} 75.0 %", "dog, n 4"]


def test_a_bin_of_confidence_is_a_dot_by_its_accuracy(drawn: list[Any]) -> None:
    bins = [Bin(0, None, None), Bin(1, 0.3, 1.0), Bin(4, 0.9, 0.75)]
    plot_calibration(a_row(n=5, metrics={"acc1": 0.8, "ece": 0.26}, calibration=bins), "own.png")
    (dots,) = drawn[0].axes[0].collections
    np.testing.assert_allclose(dots.get_offsets(), [[30, 100], [90, 75]])
    assert dots.get_sizes().tolist() == [10 + 90 / 4, 100]
