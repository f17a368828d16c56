"""Whether a search can say "nothing": queries for things that an index has, and the same queries of
the index without them, over the least score.

python benchmarks/least_score.py --model-repository REPO --data DATA/drawings

The release is one that was exported with the drawings' validation data (the demo's classifier, with
radapter-export --validation own), which chose the threshold; the tests are other drawings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Report, of_drawings, say
from matplotlib.figure import Figure
from numpy.typing import NDArray

from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.model import Model
from radapter_serve.release.confidence import KEPT

STEPS = np.linspace(0, 1, 201)
FEW = 5  # per cent of false answers that a careful user takes
PICTURE = "least-score.png"


@dataclass(frozen=True)
class Rates:
    """What becomes of queries at a least score; shares in [0, 1].

    Attributes:
        images: that the query for their own class keeps.
        queries: for classes that are there, which an image of the class answers.
        wrong: of all pairs of a query and an image of another class, those that are left out.
        false_answers: queries that anything answers where all images of the class are taken out.
    """

    images: float
    queries: float
    wrong: float
    false_answers: float


def rates(cosines: NDArray[np.float32], truth: NDArray[np.int64], least: float) -> Rates:
    """The rates of the classes that have images.

    Args:
        cosines: of each query with each image, [C, N].
        truth: class of each image, [N].
        least: score from which an image is given back.
    """
    there = np.unique(truth)
    enough = cosines[there] >= least
    own = there[:, None] == truth
    return Rates(
        images=float(enough[own].mean()),
        queries=float((enough & own).any(axis=1).mean()),
        wrong=float(1 - enough[~own].mean()),
        false_answers=float((enough & ~own).any(axis=1).mean()),
    )


def main() -> None:
    """Embed, judge each threshold, write the table and draw the curve."""
    arguments = of_drawings(__doc__)
    names = [split_label(line)[0] for line in read_label_file(arguments.data / "classes.txt")]
    shifts = sorted(path for path in (arguments.data / "shifts").iterdir() if path.is_dir())
    folders = {"validation": arguments.data / "val", "colour": arguments.data / "test"}
    folders |= {path.name: path for path in shifts}
    judged: dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}
    with Model(arguments.model_repository) as model:
        release = model.release()
        texts = model.embed_texts(names)
        for name, folder in folders.items():
            files = sorted(folder.glob("*/*.png"))
            say(f"{name}: {len(files)} drawings")
            truth = np.array([names.index(file.parent.name) for file in files])
            judged[name] = texts @ model.embed_images(files).T, truth
    least = float(release.facts["confidence"]["min_score"])
    few = _careful(judged["validation"])
    report = Report(
        "least_score",
        "A search that can say nothing",
        f"{len(names)} names of classes ask for drawings, by the demo's classifier at"
        f" α = {release.alpha:g}. The validation drawings chose both thresholds: the release's own"
        f" (`calibrated`, {least:.3f}), which {KEPT:.0%} of them reach with the name of their"
        f" class, and {few:.3f}, which at most {FEW} % of the names reach where their drawings are"
        " taken out. *False answers* are queries of the index without the class's drawings that"
        " get any image back.",
        timed=False,
    )
    for title, value in (("calibrated", least), (f"at most {FEW} % false", few)):
        report.table(
            f"min_score = {value:.3f} ({title}), in %",
            ["index", "drawings", "drawings kept", "queries kept", "wrong out", "false answers"],
            [[name, str(len(of[1])), *_cells(rates(*of, value))] for name, of in judged.items()],
        )
    report.write(arguments.out)
    _draw(judged, {"calibrated": least, f"{FEW} % false": few}, arguments.out / PICTURE)


def _careful(validation: tuple[NDArray[np.float32], NDArray[np.int64]]) -> float:
    """The lowest threshold with few false answers."""
    for least in STEPS:
        if rates(*validation, least).false_answers <= FEW / 100:
            return float(least)
    return 1.0


def _cells(of: Rates) -> list[str]:
    return [f"{100 * one:.1f}" for one in (of.images, of.queries, of.wrong, of.false_answers)]


def _draw(judged: dict[str, Any], thresholds: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, style in (("colour", "-"), ("emoji-noto", "--")):
        found = [rates(*judged[name], least) for least in STEPS]
        kept = [100 * one.queries for one in found]
        false = [100 * one.false_answers for one in found]
        axes.plot(STEPS, kept, style, color="tab:blue", label=f"{name}: queries kept")
        axes.plot(STEPS, false, style, color="tab:red", label=f"{name}: false answers")
    for name, value in thresholds.items():
        axes.axvline(value, color="grey", linewidth=1, linestyle=":")
        axes.annotate(name, (value, 58), rotation=90, ha="left", fontsize=8, color="grey")
    axes.set_xlabel("min_score")
    axes.set_ylabel("%")
    axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
