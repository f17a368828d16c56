"""Plots of results."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from radapter_serve.evaluation.alpha_choice import Choice
from radapter_serve.evaluation.rows import (
    Row,
    by_shift,
    display_name,
    mean_kept,
    metric_name,
    own_metric,
)
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.files import file_name

Points = Sequence[Mapping[str, float]]


def draw_choice(choice: Choice, folder: Path) -> Path:
    """Draw the curve that α was chosen from as `validation.png`; returns its path."""
    path = folder / "validation.png"
    points = [
        {"alpha": point.alpha, **{name: 100 * value for name, value in point.metrics.items()}}
        for point in choice.curve
    ]
    kept = {point.alpha: 100 * point.kept for point in choice.curve if point.kept is not None}
    plot_alpha_curve(
        points,
        *by_shift(choice.sets),
        path,
        title=f"validation\nauto: α = {choice.alpha:g}, best: {choice.best:g}",
        unit=_unit(data.metric for data in choice.sets.values()),
        kept=kept,
        choice=choice,
    )
    return path


def draw(rows: Sequence[Row], folder: Path, title: str, *, curve_too: bool = True) -> list[Path]:
    """Draw the α curves, if `curve_too`, and the confusion matrices of the rows of one call;
    returns the pictures' paths.
    """
    unit = _unit(row.metric for row in rows)
    pictures = []

    # A curve for each way of segmentation.
    ways: dict[str, list[Row]] = {}
    for row in rows if curve_too else ():
        ways.setdefault("proposals" if row.dense == PROPOSALS else "dense", []).append(row)
    for way, of_way in ways.items():
        points = []
        kept = {}
        for alpha in sorted({row.alpha for row in of_way if row.alpha is not None}):
            at_alpha = [row for row in of_way if row.alpha == alpha]
            points.append({"alpha": alpha, **{row.dataset: own_metric(row) for row in at_alpha}})
            if (share := mean_kept(at_alpha)) is not None:
                kept[alpha] = share
        if len(points) < 2:
            continue
        path = folder / ("alpha.png" if len(ways) == 1 else f"alpha-{way}.png")
        plot_alpha_curve(
            points,
            *by_shift({row.dataset: row for row in of_way}),
            path,
            title=title,
            unit=unit,
            kept=kept,
        )
        pictures.append(path)

    # The confusion matrix of each data set, for the last model that has it.
    confused = {row.dataset: row for row in rows if row.confusion is not None}
    for dataset, row in confused.items():
        pictures.append(folder / f"confusion-{file_name(dataset)}.png")
        plot_confusion(row, pictures[-1])
    return pictures


def _unit(metrics: Iterable[str]) -> str:
    """The unit of an axis of these metrics, such as `mIoU, %`, or `%` if they differ."""
    names = {metric_name(metric) for metric in metrics}
    return f"{names.pop()}, %" if len(names) == 1 else "%"


def plot_alpha_curve(
    rows: Points,
    ids: Sequence[str],
    ood_names: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    other_methods: Mapping[str, Points] | None = None,
    unit: str = "%",
    kept: Mapping[float, float] | None = None,
    choice: Choice | None = None,
) -> None:
    """Draw the α curve, out-of-distribution figures against those in distribution (the paper's Fig.
    3), and each set over α; all figures are in per cent.
    """
    groups = [names for names in (ids, ood_names) if names]
    figure = Figure(figsize=(5 * len(groups) + 1.3, 4.2), dpi=150, layout="constrained")
    panels = list(figure.subplots(1, len(groups), squeeze=False)[0])
    if len(groups) == 2:
        _draw_curve(panels[0], groups, {"R-Adapter": rows, **(other_methods or {})}, unit)
    each = panels[-1]
    alphas = [row["alpha"] for row in rows]
    for number, name in enumerate((*ids, *ood_names)):
        # Colours repeat after ten sets, so the marker changes.
        style = "-" if name in ids else "--"
        marker = "os^D"[number // 10 % 4]
        values = [row[name] for row in rows]
        each.plot(alphas, values, style, marker=marker, markersize=3, label=_shown(name))
    if choice is not None:
        _mark(each, choice)
    each.set_xlabel("α")
    each.set_ylabel(unit)
    handles, labels = each.get_legend_handles_labels()
    if kept:
        right = each.twinx()
        places = sorted(kept)
        shares = [kept[alpha] for alpha in places]
        handles += right.plot(places, shares, ":", color="black", marker="x", markersize=4)
        labels.append("kept of the base (right)")
        right.set_ylim(min(90.0, *shares) - 2, 102)
        right.set_ylabel("kept of the base's answers, %")
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.suptitle(_shown(title))
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    """Save a figure: a `$` in a name begins no formula, and a letter that the font lacks becomes a
    box.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path)


def _shown(name: str) -> str:
    """Keep the end of a long name, such as that of a folder, for which a figure has no room."""
    return name if len(name) <= 40 else f"…{name[-39:]}"


def _mark(axes: Axes, choice: Choice) -> None:
    alphas = [point.alpha for point in choice.curve]
    scores = np.array([100 * point.score for point in choice.curve])
    halves = np.array([100 * point.plus_minus for point in choice.curve])
    axes.plot(alphas, scores, "-", color="gray", linewidth=1, label="score")
    axes.fill_between(
        alphas,
        scores - halves,
        scores + halves,
        color="gray",
        alpha=0.2,
        label="95 %, of the distance from the best",
    )
    if alphas[0] == 0:
        axes.axhline(scores[0], color="gray", linestyle=":", linewidth=1, label="the base's level")
    for name, alpha, style in (
        ("auto", choice.alpha, "-"),
        ("smallest as good as the best", choice.smallest, "--"),
        ("best", choice.best, ":"),
    ):
        label = f"{name}: α = {alpha:g}"
        axes.axvline(alpha, color="tab:red", linestyle=style, linewidth=1, label=label)


def _draw_curve(
    axes: Axes, groups: Sequence[Sequence[str]], methods: Mapping[str, Points], unit: str
) -> None:
    for number, (method, points) in enumerate(methods.items()):
        x, y = (
            [sum(row[name] for name in names) / len(names) for row in points] for names in groups
        )
        axes.plot(x, y, "o-", color=("tab:red", "tab:blue", "tab:gray")[number % 3], label=method)
        for row, place in zip(points, zip(x, y, strict=True), strict=True):
            label = {0.0: "zero-shot, α = 0", 1.0: "α = 1"}.get(row["alpha"], f"{row['alpha']:g}")
            if number and row["alpha"] == 0.0:  # all methods start at the base
                continue
            offset = (5, -10 if number else 4)
            axes.annotate(label, place, xytext=offset, textcoords="offset points", fontsize=8)
    for set_label, where, names in (
        (axes.set_xlabel, "in", groups[0]),
        (axes.set_ylabel, "out of", groups[1]),
    ):
        what = _shown(names[0]) if len(names) == 1 else f"mean of {len(names)}"
        joint = ", in" if unit == "%" else ","
        set_label(f"{where} distribution: {what}{joint} {unit}")
    axes.margins(0.15)
    if len(methods) > 1:
        axes.legend(fontsize=8)


def plot_confusion(row: Row, path: str | Path) -> None:
    """Draw a row's confusion matrix, with the images, or pixels, of each class."""
    assert row.per_class is not None
    counts = np.array(row.confusion, float)
    if not counts[:, -1].any():
        counts = counts[:, :-1]  # no image was answered with "none"
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [figures.name for figures in row.per_class]
    side = 2.5 + 0.3 * len(names)
    figure = Figure(figsize=(side + 1.5, side), dpi=150, layout="constrained")
    axes = figure.subplots()
    figure.colorbar(
        axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100), label="% of the true class"
    )
    if len(names) <= 15:
        for (i, j), share in np.ndenumerate(shares):
            axes.text(
                j,
                i,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
            )
    axes.set_xticks(range(counts.shape[1]), [*names, "none"][: counts.shape[1]], rotation=90)
    labels = []
    for figures in row.per_class:
        kind, value = ("recall", figures.recall) if row.dense is None else ("iou", figures.iou)
        shown = "" if value is None else f", {kind} {100 * value:.1f} %"
        labels.append(f"{figures.name}, n {figures.n}{shown}")
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    figure.suptitle(f"{row.dataset}: {display_name(row.source, row.alpha, ', α = ')}")
    _save(figure, path)
