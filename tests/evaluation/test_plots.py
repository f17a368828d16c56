"""Pictures of results: what they show, read from matplotlib's own objects or from the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from radapter_serve.evaluation.alpha_choice import choose
from radapter_serve.evaluation.plots import (
    draw_choice,
    plot_alpha_curve,
    plot_bars,
    plot_calibration,
    plot_confusion,
)
from radapter_serve.evaluation.rows import Bin, ClassFigures, Row
from tests.helpers.a_row import a_row


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, in place of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    return figures


def test_picture_with_another_method_beside_it_and_of_one_set_alone(tmp_path: Path) -> None:
    rows = [{"alpha": a, "a": 50 + 20 * a, "b": 40 - 15 * a * a} for a in (0.0, 0.5, 1.0)]
    other = [{"alpha": a, "a": 50 + 10 * a, "b": 40 - 20 * a} for a in (0.0, 1.0)]
    plot_alpha_curve(rows, ["a"], ["b"], tmp_path / "with.png", beside={"WiSE-FT": other})
    plot_alpha_curve(rows, ["a"], ["b"], tmp_path / "without.png")
    plot_alpha_curve(rows, ["a"], [], tmp_path / "alone.png")
    blue = []
    for name, width in (("with", 1695), ("without", 1695), ("alone", 945)):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (width, 630)
            left = image.convert("RGB").crop((0, 0, 740, 630)).getcolors(1 << 20) or []
            blue.append(sum(n for n, c in left if c == (31, 119, 180)))
    assert (
        blue[0] > 500 and blue[1] == 0
    )  # the other method is in the left panel, and only there where it is given


def test_what_is_kept_of_the_base_has_an_axis_of_its_own(drawn: list[Figure]) -> None:
    rows = [{"alpha": a, "a": 60 + 5 * a, "b": 40 + a} for a in (0.0, 0.5, 1.0)]
    plot_alpha_curve(rows, ["a"], ["b"], "curve.png", kept={1.0: 71.0, 0.0: 100.0})
    *panels, right = drawn[0].axes
    (line,) = right.get_lines()
    assert line.get_xydata().tolist() == [[0, 100], [1, 71]]  # type: ignore[union-attr]
    assert right.get_ylabel() == "kept of the base's answers, %"
    assert right.get_ylim()[0] < 71 and right.get_ylim()[1] > 100
    assert [len(axes.get_lines()) for axes in panels] == [1, 2]  # as without it
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["a", "b", "kept of the base (right)"]
    plot_alpha_curve(rows, ["a"], ["b"], "curve.png")
    assert len(drawn[1].axes) == 2


def test_a_choice_is_marked_in_the_picture(drawn: list[Figure]) -> None:
    right = {0.0: 0.2, 0.3: 0.9, 0.5: 0.9, 1.0: 1.0}
    rows = [
        a_row(alpha=alpha, metrics={"acc1": share}, intervals={"acc1": (share - 0.15, 1.0)})
        for alpha, share in right.items()
    ]
    choice = choose(rows, 0.5)
    draw_choice(choice, Path())
    axes = drawn[0].axes[0]
    marks = {str(line.get_label()): line for line in axes.get_lines()}
    assert marks["auto: α = 0.3"].get_xdata() == [0.3, 0.3]
    assert {"smallest as good as the best: α = 0.3", "best: α = 1"} < set(marks)
    assert marks["the base's level"].get_ydata() == pytest.approx([20, 20])
    (band,) = axes.collections
    box = band.get_paths()[0].get_extents()
    assert (box.y0, box.y1) == pytest.approx((5, 115))


def test_no_two_of_many_sets_look_the_same(drawn: list[Figure]) -> None:
    names = [f"set {number}" for number in range(40)]
    rows = [{"alpha": alpha, **dict.fromkeys(names, 1.0)} for alpha in (0.0, 1.0)]
    plot_alpha_curve(rows, [], names, "curve.png")
    (axes,) = drawn[0].axes
    looks = {(line.get_color(), line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == len(axes.get_lines()) == 40


def test_bars_of_many_models_and_sets(tmp_path: Path) -> None:
    values = {f"α = {a}": dict.fromkeys("abcdef", 50.0 + a) for a in range(11)}
    plot_bars(values, tmp_path / "bars.png", title="A title")
    with Image.open(tmp_path / "bars.png") as image:
        assert image.width > 1500


def row(confusion: list[list[int]], kind: str, values: list[float | None]) -> Row:
    classes = [
        ClassFigures(f"thing {number}", 4, value, value) for number, value in enumerate(values)
    ]
    dense = "naclip" if kind == "iou" else None
    return a_row(confusion=confusion, per_class=classes, dense=dense)


@pytest.mark.parametrize(("none", "kind"), [(0, "recall"), (1, "iou")])
def test_a_confusion_is_shown_in_per_cent_of_the_true_class(
    drawn: list[Figure], none: int, kind: str
) -> None:
    plot_confusion(row([[3, 1, 0], [4 - none, 0, none]], kind, [0.75, None]), "own.png")
    axes = drawn[0].axes[0]
    shares = [[75, 25, 0], [75, 0, 25]] if none else [[75, 25], [100, 0]]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), shares)  # type: ignore[arg-type]
    assert image.get_clim() == (0, 100) and image.get_cmap().name == "Blues"
    written = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert written == {
        (column, line): (str(share), "white" if share > 50 else "black")
        for line, of in enumerate(shares)
        for column, share in enumerate(of)
    }
    assert {
        (text.get_horizontalalignment(), text.get_verticalalignment()) for text in axes.texts
    } == {("center", "center")}
    found = [label.get_text() for label in axes.get_xticklabels()]
    assert (
        found == ["thing 0", "thing 1", "none"][: len(shares[0])]
        and axes.get_xticks().tolist() == [0, 1, 2][: len(found)]
    )
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {90}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"thing 0, n 4, {kind} 75.0 %",
        "thing 1, n 4",
    ]
    assert axes.get_yticks().tolist() == [0, 1]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("answered", "true")
    assert drawn[0].axes[1].get_ylabel() == "% of the true class"
    assert drawn[0].get_suptitle() == "own: adapter, α = 0.5"
    assert (
        drawn[0].get_size_inches().tolist() == pytest.approx([4.6, 3.1])
        and drawn[0].get_dpi() == 150
    )


@pytest.mark.parametrize(("classes", "cells"), [(15, 225), (16, 0)])
def test_the_cells_of_few_classes_have_figures(
    drawn: list[Figure], classes: int, cells: int
) -> None:
    counts = np.eye(classes, classes + 1, dtype=int)
    counts[0, 0] = 0  # a class without an image
    plot_confusion(row(counts.tolist(), "recall", [None] * classes), "own.png")
    axes = drawn[0].axes[0]
    assert len(axes.texts) == cells
    np.testing.assert_array_equal(axes.images[0].get_array(), 100 * counts[:, :-1])  # type: ignore[arg-type]


def test_a_bin_of_confidence_is_a_dot_by_its_accuracy(drawn: list[Figure]) -> None:
    bins = [Bin(0, None, None), Bin(1, 0.3, 1.0), Bin(4, 0.9, 0.75)]
    plot_calibration(a_row(n=5, metrics={"acc1": 0.8, "ece": 0.26}, calibration=bins), "own.png")
    axes = drawn[0].axes[0]
    (dots,) = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), [[30, 100], [90, 75]])  # type: ignore[arg-type]
    assert dots.get_sizes().tolist() == [10 + 90 / 4, 100]  # type: ignore[attr-defined]
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 0], [100, 100]]  # type: ignore[union-attr]
    assert drawn[0].get_suptitle() == "own: adapter, α = 0.5\nECE 26.0 %, n 5"
