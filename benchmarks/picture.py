"""The picture of the README and of the page of results: accuracy in the trained style and in nine
others over α, from the tables of `benchmarks/results/demo.md`.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks" / "results" / "demo.md"
PICTURE = ROOT / "docs" / "images" / "result.svg"
Point = tuple[float, float, float, float]  # in colour, other styles, and how much seeds vary


def numbers(cell: str) -> tuple[float, float]:
    """A mean and its standard deviation over the seeds, 0 where there is none."""
    mean, _, spread = cell.partition("±")
    return float(mean), float(spread or 0)


def path_of(text: str, title: str) -> dict[float, Point]:
    """The points of a table over α."""
    table = text.partition(f"**{title}")[2].partition("\n**")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    alphas = [float(cell.removeprefix("α = ")) for cell in rows[0][2:]]
    styles = {
        "own": next(row for row in rows if row[0].startswith("in colour")),
        "others": next(row for row in rows if re.match(r"mean of the \d+ shifts", row[0])),
    }
    path = {}
    for column, alpha in enumerate(alphas, 2):
        own, own_spread = numbers(styles["own"][column])
        others, others_spread = numbers(styles["others"][column])
        path[alpha] = (own, others, own_spread, others_spread)
    return path


def draw(text: str, picture: Path) -> None:
    """Draw both paths, the base and full fine-tuning."""
    adapter = path_of(text, "Classification: acc1")
    full = path_of(text, "Full fine-tuning over α (WiSE-FT): acc1")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "radapter", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    base = adapter[0.0]
    axes.axhline(base[1], color="#999999", linewidth=1, linestyle=":")
    axes.axvline(base[0], color="#999999", linewidth=1, linestyle=":")
    kinds = (("R-Adapter", adapter, "#3f51b5", "o-"), ("fine-tuning", full, "#c0392b", "s--"))
    for label, path, colour, style in kinds:
        own, others, own_spread, others_spread = zip(*path.values(), strict=True)
        axes.errorbar(
            own, others, others_spread, own_spread, style, color=colour, label=label, capsize=2
        )
    for alpha, (x, y, *_) in adapter.items():
        if alpha:
            place = (5, -15) if alpha == 0.5 else (7, 7)  # beside the line of fine-tuning
            axes.annotate(f"α = {alpha:g}", (x, y), place, textcoords="offset points")
    axes.annotate("before", base[:2], (-8, -16), textcoords="offset points", ha="right")
    for label, alpha, offset in (("full fine-tuning", 1.0, (8, -16)), ("WiSE-FT", 0.5, (40, -4))):
        axes.annotate(label, full[alpha][:2], offset, textcoords="offset points", color="#c0392b")
    axes.set(
        xlabel="accuracy in the trained style, %",
        ylabel="mean of nine other styles, %",
        xlim=(44.5, 52.5),
        ylim=(45, 49),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(picture, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(TABLES.read_text(encoding="utf-8"), PICTURE)
    print(f"wrote {PICTURE.relative_to(ROOT)}")
