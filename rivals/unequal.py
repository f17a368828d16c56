"""`python -m rivals.unequal`: learn from classes of unequal size, with and without what should help
the rare ones.
"""

from __future__ import annotations

import datetime
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import Tensor

from radapter_serve.cli import run as run_command
from radapter_serve.data import Labelled
from radapter_serve.evaluation.rows import Row
from radapter_serve.training.tasks import Data
from rivals.flags import check_seeds
from rivals.layout import T95, markdown, paired_leads, spread
from rivals.make import command_line, machine, publish
from rivals.small import LIMIT, Set, learned, runs_of, set_of, table_of, tested

STEPS = 105  # as in the main table
VALIDATION = ", validation"  # the end of the names of sets that choose
ALPHAS = (0.5, 1.0)
MOST = {"drawings": 30, "pacs": 100}  # images of the most frequent class; the rarest has one
# By set: without additions and with them, each at the rate of its row in the main table.
RATES = {"drawings": (1.6e-4, 5e-4), "pacs": (5e-4, 5e-3)}
ADDITIONS: dict[str, Any] = {"drop": 0.0, "preserve": 10.0, "negative_classes": 1000}


def logit_adjustment(data: Data) -> Tensor:
    """The logarithm of each class's share of the images, float [classes] (Menon et al., ICLR 2021,
    with τ = 1).

    Within a batch a class has a text for each of its images, so R-Adapter's denominator weighs a
    class by its share already. This weighs it once more.
    """
    assert isinstance(data, Labelled)
    counts = torch.from_numpy(data.labels()).bincount(minlength=len(data.classes))
    return (counts / counts.sum()).log()


@dataclass(frozen=True)
class Way:
    """One way to learn.

    Attributes:
        additions: whether R-Adapter has `ADDITIONS`.
        balanced: whether every class is drawn equally often.
        class_offsets: as of `rivals.loop.train`.
    """

    additions: bool = False
    balanced: bool = False
    class_offsets: Callable[[Data], Tensor] | None = None


WAYS = {
    f"{form}{what}": Way(additions, balanced, class_offsets)
    for form, additions in (("R-Adapter", False), ("with both additions", True))
    for what, balanced, class_offsets in (
        ("", False, None),
        (", balanced batches", True, None),
        (", logit adjustment", False, logit_adjustment),
    )
}


def unequal(images: Mapping[str, Sequence[Path]], most: int, seed: int) -> dict[str, list[Path]]:
    """Images of each class, the most frequent first; their numbers fall from `most` to 1 by equal
    factors. Where no class that is left has enough images, the largest of them takes the place.

    Args:
        images: by class.
        most: images of the most frequent class.
        seed: of the draw of the images, and of the classes for each place.
    """
    chance = random.Random(seed)
    left = dict(images)
    drawn = {}
    for place in range(len(images)):
        size = round(most ** (1 - place / (len(images) - 1)))
        largest = max(sorted(left), key=lambda label: len(left[label]))
        enough = [label for label in sorted(left) if len(left[label]) >= size] or [largest]
        label = chance.choice(enough)
        own = left.pop(label)
        drawn[label] = chance.sample(list(own), min(size, len(own)))
    return drawn


def evened(images: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
    """Images by class, those of a class repeated until they are as many as of the most frequent."""
    most = max(len(own) for own in images.values())
    return {label: list(islice(cycle(own), most)) for label, own in images.items()}


def recalls(row: Row, classes: Sequence[str]) -> dict[str, float]:
    """Mean recall in % of all classes, of the most frequent third, and of the rarest third.

    Args:
        row: of results; classes that it has no images of are left out.
        classes: the most frequent first.
    """
    assert row.per_class is not None
    third = len(classes) // 3
    of_classes = {"all": classes, "frequent": classes[:third], "rare": classes[-third:]}
    recall = {one.name: one.recall for one in row.per_class if one.n and one.recall is not None}
    return {
        name: 100 * mean(recall[label] for label in own if label in recall)
        for name, own in of_classes.items()
    }


@dataclass(frozen=True)
class Found:
    """What one run gave.

    Attributes:
        candidate, seed: of the run.
        seconds: of training.
        figures: by α, as text, and `FIGURES`: the mean recall of the classes in %.
    """

    candidate: str
    seed: int
    seconds: float
    figures: dict[str, dict[str, float]]


def measured(of: Set, name: str, way: str, seed: int, threads: int | None, folder: Path) -> Found:
    """Train on the unequal classes, and judge at every α of `ALPHAS`."""
    images = unequal(of.images, MOST[name], seed)
    chosen = WAYS[way]
    run, seconds = learned(
        "imagenet",
        seed,
        threads,
        folder,
        batch_size=64,
        steps=STEPS,
        data=table_of(evened(images) if chosen.balanced else images, folder),
        class_offsets=chosen.class_offsets,
        **{"classes": None, **of.fields},
        **(ADDITIONS if chosen.additions else {}),
        learning_rate=RATES[name][chosen.additions],
    )
    rows = tested(of, run, ALPHAS, threads, folder, own_validation=True)
    figures = {
        f"{alpha:g}": figures_of([row for row in rows if row.alpha == alpha], list(images))
        for alpha in ALPHAS
    }
    return Found(way, seed, seconds, figures)


FIGURES = [
    "validation",
    *("in distribution", "its frequent third", "its rare third"),
    *("shifts", "their frequent third", "their rare third"),
]


def figures_of(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, float]:
    """The figures of one run at one α, by `FIGURES`.

    Args:
        rows: one of each data set.
        classes: the most frequent first.
    """
    chooses = mean(recalls(row, classes)["all"] for row in rows if row.dataset.endswith(VALIDATION))
    tests = [row for row in rows if not row.dataset.endswith(VALIDATION)]
    (own,) = (recalls(row, classes) for row in tests if row.shift == "id")
    shifts = [recalls(row, classes) for row in tests if row.shift == "ood"]
    of_shifts = [mean(one[part] for one in shifts) for part in own]
    return dict(zip(FIGURES, [chooses, *own.values(), *of_shifts], strict=True))


def best(found: Sequence[Found]) -> str:
    """The α of the best validation over the seeds, as text."""
    return max(found[0].figures, key=lambda at: mean(of.figures[at]["validation"] for of in found))


def tables(found: Mapping[str, Sequence[Found]]) -> list[str]:
    """The figures of every way, and what it leads the first of its form by."""
    lines = []
    ahead = []
    for candidate, runs in found.items():
        first = next(name for name in found if WAYS[name].additions == WAYS[candidate].additions)
        own, of_first = (
            [list(one.figures[best(of)].values()) for one in of] for of in (runs, found[first])
        )
        seconds = f"{median(one.seconds for one in runs):.0f}"
        spreads = [spread(column) for column in zip(*own, strict=True)]
        lines.append([candidate, best(runs), *spreads, seconds])
        if candidate != first:
            ahead.append([candidate, *paired_leads(own, of_first)])
    return [
        markdown(["way", "α", *FIGURES, "time, s"], lines),
        "What each leads the first row of its form by, paired over the seeds, ± its 95 % interval.",
        markdown(["way", *FIGURES], ahead),
    ]


def compare(
    set_name: Literal["drawings", "pacs"],
    data_root: Path,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    threads: int | None = None,
) -> None:
    """Learn from classes of unequal size by R-Adapter, with and without our additions, each plain,
    with balanced batches and with logit adjustment; judge all classes, the frequent and the rare;
    print it, write Markdown.

    Args:
        set_name: what to learn from.
        data_root: folder with drawings/ and pacs/.
        out: folder of unequal.md, and of the finished runs, which are not made again.
        seeds: each way learns once for each.
        threads: to compute with; one a core if none is given.
    """
    check_seeds(seeds, len(T95) + 1)
    with tempfile.TemporaryDirectory() as folder:
        of = set_of(set_name, data_root.resolve(), Path(folder))
        found = runs_of(
            WAYS,
            seeds,
            out / "unequal.json",
            Found,
            lambda way, seed, place: measured(of, set_name, way, seed, threads, place),
        )
    most = MOST[set_name]
    rates = " and ".join(f"{rate:g}" for rate in RATES[set_name])
    parts = [
        "# Classes of unequal size",
        f"`{command_line('rivals.unequal')}`, {datetime.date.today()}, {machine()}.\n"
        f"{len(of.images)} classes, of which the most frequent has {most} images and the rarest"
        f" one; {STEPS} steps of 64; the demo's base. Figures are the mean recall of the classes in"
        " %, mean ± standard deviation over the seeds, on at most"
        f" {LIMIT} images of a set.\n"
        f"Validation, in distribution and {of.style.partition(',')[0]}, chose α, 0.5 or 1. The"
        f" rates are those of the main table, {rates}. Additions are drop 0, preserve 10 and"
        " negative_classes 1000. Balanced batches draw every class equally often. Logit adjustment,"
        " in training, adds the logarithm of a class's share to the logits of an image. A seed"
        " draws the images, and which class has how many, as far as the classes have as many: of"
        " the drawings the largest classes are always the frequent ones.",
        *tables(found),
    ]
    publish(parts, out / "unequal.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(compare, argv, prog="python -m rivals.unequal")


if __name__ == "__main__":
    sys.exit(main())
