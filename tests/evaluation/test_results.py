"""Rows of results, by hand: their file, their table, and their pictures, read from matplotlib."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import choose
from radapter_serve.evaluation.plots import draw, draw_choice, plot_alpha_curve, plot_confusion
from radapter_serve.evaluation.rows import ClassFigures, Results, Row, packed, table
from radapter_serve.evaluation.start import status
from radapter_serve.release.release import Quantization
from tests.helpers.a_row import a_row
from tests.helpers.fake_clock import FakeClock


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, in place of their files."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    return figures


def test_a_table_has_intervals_calibration_errors_means_and_what_is_kept() -> None:
    interval = {"acc1": (0.4, 0.61)}
    rows = [
        a_row("a", 0.5, metrics={"acc1": 0.5, "kept": 0.75, "ece": 0.123}, intervals=interval),
        a_row("b", 0.25, metrics={"acc1": 0.25, "kept": 0.5}),
        a_row("c", 0.5, metric="miou", metrics={"miou": 0.5}),
        a_row("d", 0.5, metric="mean_class_accuracy", metrics={"mean_class_accuracy": 0.5}),
        a_row("a", 0.5, source="merged"),
    ]
    columns = {
        " ".join(str(of.header).split()): list(of.cells) for of in table(rows, "t").columns[2:]
    }
    assert columns == {
        "a acc1, id n 20": ["50.00\n40.0 – 61.0\nECE 12.3", "50.00"],
        "b acc1, id n 20": ["25.00", ""],
        "c mIoU, id n 20": ["50.00", ""],
        "d mean acc, id n 20": ["50.00", ""],
        "mean of 2 id": ["37.50", ""],
        "kept of the base": ["62.50", ""],
    }


def test_sets_that_are_measured_in_different_ways_have_no_common_mean(
    drawn: list[Any], tmp_path: Path
) -> None:
    dense: dict[str, Any] = {"metric": "miou", "dense": "naclip", "alpha": 0.0}
    masks = {**dense, "dense": "proposals"}
    rows = [
        a_row("a", metrics={"miou": 0.5}, **dense),
        a_row("b", metrics={"miou": 0.25}, **dense),
        a_row("c", metrics={"miou": 0.1}, **masks),
        a_row("d", metrics={"miou": 0.1}, proposals="found", **masks),
    ]
    means = [of for of in table(rows, "t").columns if "mean of" in str(of.header)]
    assert [list(of.cells) for of in means] == [["37.50"]]
    curves = draw([*rows, *(replace(row, alpha=1.0) for row in rows)], tmp_path, "")
    assert [path.name for path in curves] == ["alpha-dense.png", "alpha-proposals.png"]


def test_rows_are_written_into_new_folders_and_replace_earlier_ones(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    results = Results(folder)
    full_row = a_row(
        "bü",
        alpha=None,
        crop=MaskCrop(),
        templates=("{}", "a {}"),
        per_class=[ClassFigures("cat", 3, 0.5, None)],
        intervals={"acc1": (0.25, 1.0)},
        quantization=Quantization("dynamic"),
        indistinguishable=[("a", "b")],
        right="8AAA",
    )
    results.add([a_row("a", 0.5), full_row])
    results.add([a_row("a", 0.75)])
    read_results = Results(folder)
    assert results.rows == read_results.rows == [full_row, a_row("a", 0.75)]
    assert (results.measured, read_results.measured) == (3, 0)
    assert read_results.find(replace(full_row, metrics={"acc1": 0.75}, runtime=9)) == full_row
    assert read_results.find(a_row("c", 0.5)) is None
    values = full_row.to_dict()
    assert [name for name, value in values.items() if value is None] == ["alpha"]
    assert values["per_class"] == [{"class": "cat", "n": 3, "recall": 0.5}]
    assert values["crop"] == {"padding": 0.0, "square": True, "fill": [123, 117, 104]}


def test_a_row_has_what_each_image_adds_to_its_metric() -> None:
    right = np.arange(11) % 3 == 0
    row = Row.from_json(json.dumps(a_row(share=4 / 11, n=11, right=packed(right)).to_dict()))
    assert row.right == base64.b64encode(bytes([0b10010010, 0b01000000])).decode()
    assert row.per_image is not None and row.per_image.tolist() == right.tolist()
    # Three images with six captions, of which four are right.
    shares = a_row(n=3, captions=6, right=[1, 3, 0]).per_image
    assert shares is not None and shares.tolist() == [0.5, 1.5, 0] and shares.mean() == 4 / 6
    assert a_row().per_image is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: Unexpected"),
        ({"metrics": {"acc1": "high"}}, "metrics.acc1: Input should be a valid number"),
        ({"per_class": [{"class": "cat"}]}, "per_class.0.n: Field required"),
        ({"right": "AAA="}, "right should have a bit for each of 20 images"),
        ({"right": "?"}, ""),
        ({"right": [1, 0]}, "right should have a number for each of 20 images"),
    ],
)
def test_a_line_that_is_no_row_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    lines = [a_row().to_dict(), a_row().to_dict() | change]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RAdapterError) as error:
        Results(tmp_path)
    assert f"results.jsonl, line 2 is not a row of results: {message}" in str(error.value)


@pytest.mark.parametrize(("show", "terminal"), [(True, True), (True, False), (False, True)])
def test_progress_is_one_line_on_a_terminal_and_now_and_then_one_elsewhere(
    show: bool, terminal: bool
) -> None:
    long = "plain: reading [b]imagefolder:photos[/b] " + 20 * "and more "
    clock = FakeClock()
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=300 if terminal else 40)
    with status(console, show=show, clock=clock.monotonic) as say:
        for line in ("at 0", "at 5", long, "at 15", "[b]last"):
            say(line)
            clock.sleep(5)
    text = out.getvalue()
    if show and terminal:
        assert "[b]last" in text and text.count("\n") == 1 and text.endswith("\x1b[2K")
    else:
        assert text == (f"{long}\n[b]last\n" if show else "")


def test_the_curve_has_another_method_and_what_is_kept(drawn: list[Any]) -> None:
    rows = [{"alpha": a, "a": 50 + 20 * a, "b": 40 - 15 * a * a} for a in (0.0, 0.5, 1.0)]
    other = [{"alpha": a, "a": 50 + 10 * a, "b": 40 - 20 * a} for a in (0.0, 1.0)]
    kept = {1.0: 71.0, 0.0: 100.0}
    plot_alpha_curve(rows, ["a"], ["b"], "with.png", other_methods={"WiSE-FT": other}, kept=kept)
    plot_alpha_curve(rows, ["a"], [], "alone.png")
    folder = f"imagefolder:/{'long/' * 40}photos"  # leaves no room for the curve if shown whole
    named = [{"alpha": row["alpha"], folder: row["a"], "b": row["b"]} for row in rows]
    plot_alpha_curve(named, [folder], ["b"], "named.png", title=folder)
    [label, _] = drawn[2].axes[1].get_legend_handles_labels()[1]
    assert label == f"…{folder[-39:]}" == drawn[2].get_suptitle()
    for figure in drawn:
        figure.suptitle("a title that is as wide as the picture of this curve of alpha, by far")
        figure.draw_without_rendering()
        [legend] = figure.legends
        assert not legend.get_window_extent().overlaps(figure._suptitle.get_window_extent())
    curve, of_alpha, right = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in curve.get_lines()}
    assert lines == {
        "R-Adapter": [[50, 40], [60, 36.25], [70, 25]],
        "WiSE-FT": [[50, 40], [60, 20]],
    }
    (only_axes,) = drawn[1].axes
    for axes in (of_alpha, only_axes):
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
    classes = [ClassFigures("cat", 4, 0.75, 0.75), ClassFigures("dog", 4)]
    plot_confusion(a_row(confusion=confusion, per_class=classes, dense=dense), "own.png")
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), shares)
    answered = [label.get_text() for label in axes.get_xticklabels()]
    assert answered == ["cat", "dog", "none"][: len(shares[0])]
    true = [label.get_text() for label in axes.get_yticklabels()]
    assert true == [f"cat, n 4, {kind} 75.0 %", "dog, n 4"]


def test_names_with_dollars_and_letters_that_the_font_lacks_are_drawn(tmp_path: Path) -> None:
    classes = [ClassFigures("a$_{$b", 4, 0.75, 0.75), ClassFigures("象", 4)]
    rows = [
        a_row("$_{$象", alpha=alpha, confusion=[[3, 1, 0], [4, 0, 0]], per_class=classes)
        for alpha in (0.0, 0.5)
    ]
    pictures = draw(rows, tmp_path, "$^{$")
    assert [path.name for path in pictures] == ["alpha.png", "confusion-___象.png"]
    assert all(path.stat().st_size for path in pictures)
