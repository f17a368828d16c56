"""Results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_alpha_curve(
    rows: Sequence[Mapping[str, float]], id_name: str, ood_names: Sequence[str], path: str | Path, *, title: str = ""
) -> None:
    """Draw the α curve: out-of-distribution against in-distribution accuracy (the paper's Fig. 3), and each set over α.

    Args:
        rows: from `alpha_sweep`, ascending in α.
        id_name: the in-distribution data set.
        ood_names: the shifted data sets; the curve takes their mean.
        path: a picture file; its ending says which kind.
        title: above the picture.
    """
    alphas = [row["alpha"] for row in rows]
    id_accuracy = [row[id_name] for row in rows]
    ood_accuracy = [sum(row[name] for name in ood_names) / len(ood_names) for row in rows]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    curve, each = figure.subplots(1, 2)
    assert isinstance(curve, Axes) and isinstance(each, Axes)
    curve.plot(id_accuracy, ood_accuracy, "o-", color="tab:red")
    for alpha, x, y in zip(alphas, id_accuracy, ood_accuracy, strict=True):
        label = {0.0: "zero-shot, α = 0", 1.0: "α = 1"}.get(alpha, f"{alpha:g}")
        curve.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    curve.set_xlabel(f"in distribution: {id_name}, accuracy in %")
    curve.set_ylabel(f"out of distribution: mean of {len(ood_names)}, accuracy in %")
    curve.margins(0.15)
    for name in (id_name, *ood_names):
        style = "-" if name == id_name else "--"
        each.plot(alphas, [row[name] for row in rows], style, marker="o", markersize=3, label=name)
    each.set_xlabel("α")
    each.set_ylabel("accuracy in %")
    each.legend(fontsize=8)
    for axes in (curve, each):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path)
