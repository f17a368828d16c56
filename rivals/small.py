"""`python -m rivals.small`: what the recipe `small` gains by its parts, on a few hundred images."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import yaml

from radapter_serve import evaluate, train
from radapter_serve.cli import run as run_command
from radapter_serve.contract.labels import split_label
from radapter_serve.demo.data import BASE
from radapter_serve.evaluation.rows import own_metric
from radapter_serve.files import staged
from rivals.flags import check_seeds
from rivals.layout import markdown, paired_leads, spread
from rivals.make import command_line, machine, publish, say

PAPER: dict[str, Any] = {
    "rank": 4,
    "learning_rate": 5e-4,
    "drop": 0.2,
    "preserve": 0.0,
    "preserve_words": 0.0,
    "negative_classes": 0,
}
AUTO = {**PAPER, "learning_rate": "auto"}
CANDIDATES = {
    "5e-4": PAPER,
    "auto": AUTO,
    "auto, preserve, all classes": {
        **AUTO,
        "drop": 0.0,
        "preserve": 10.0,
        "negative_classes": 1000,
    },
    "small, fp32": {"precision": "no"},
    "small, bf16": {"precision": "bf16"},
}
LIMIT = 1000  # images of a test set
CLASSES = 40  # of the drawings


@dataclass(frozen=True)
class Set:
    """Images to learn from and to judge by, below the folder of all data.

    Attributes:
        images: the training images, by class.
        shots: images of a class that a run has, held-out ones included.
        fields: of the recipe.
        suite: file of the test sets.
        root: folder that its paths start from.
        style: the shifted style of the suite that may choose, and is no test.
    """

    images: dict[str, list[Path]]
    shots: int
    fields: dict[str, Any]
    suite: Path
    root: Path
    style: str

    def draw(self, seed: int, folder: Path) -> str:
        """A table of the images that a run has, as `data` takes it."""
        chance = random.Random(seed)
        drawn = {
            label: chance.sample(images, min(self.shots, len(images)))
            for label, images in self.images.items()
        }
        return table_of(drawn, folder)


def table_of(images: Mapping[str, Iterable[Path]], folder: Path) -> str:
    """A table of images by class, in a file of the folder, as `data` takes it."""
    path = folder / "images.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label"])
        table.writerows([image, label] for label, own in images.items() for image in own)
    return f"csv:{path}"


def set_of(name: str, root: Path, folder: Path) -> Set:
    """The set of a name.

    Args:
        name: drawings or pacs.
        root: folder of all data.
        folder: empty, for the drawings with few classes.
    """
    images: dict[str, list[Path]] = {}
    if name == "pacs":
        pacs = root / "pacs"
        with (pacs / "train.csv").open(encoding="utf-8", newline="") as file:
            for image, label in list(csv.reader(file))[1:]:
                images.setdefault(label, []).append(pacs / image)
        fields: dict[str, Any] = {"templates": "simple", "crop_scale": 0.7, "flip": True}
        return Set(images, 60, fields, pacs / "suite.yaml", pacs, "sketch, validation")
    drawings = folder / "drawings"
    few_classes(root / "drawings", drawings)
    for path in sorted((drawings / "train").glob("*/*.png")):
        images.setdefault(path.parent.name, []).append(path)
    fields = {
        "classes": drawings / "classes.txt",
        "templates": f"{drawings}/templates.txt",
        "crop_scale": 0.9,
        "flip": False,
    }
    suite = Path(__file__).parents[1] / "recipes" / "suites" / "drawings.yaml"
    return Set(images, 12, fields, suite, folder, "line, validation")


def few_classes(drawings: Path, copy: Path) -> None:
    """Link the drawings of the classes that have the most of them to learn from."""
    sizes = {place.name: len(list(place.iterdir())) for place in (drawings / "train").iterdir()}
    kept = sorted(sizes, key=lambda name: (-sizes[name], name))[:CLASSES]
    lines = (drawings / "classes.txt").read_text(encoding="utf-8").splitlines()
    of_kept = [line for line in lines if split_label(line)[0] in kept]
    copy.mkdir(parents=True)
    (copy / "classes.txt").write_text("\n".join(of_kept), encoding="utf-8")
    shutil.copy(drawings / "templates.txt", copy)
    for place in [
        *(drawings / one for one in ("train", "val", "test")),
        *drawings.glob("shifts/*"),
    ]:
        own = copy / place.relative_to(drawings)
        own.mkdir(parents=True)
        for name in kept:
            if (place / name).exists():
                (own / name).symlink_to(place / name, target_is_directory=True)


@dataclass(frozen=True)
class Found:
    """What one run gave, accuracies in %.

    Attributes:
        candidate, seed: of the run.
        rate: by which it learned.
        alpha: with the highest accuracy on its held-out images.
        held_out, style: what may choose: the held-out images, and the style for validation.
        own, shifts: what is tested: the set in distribution, and the mean of the other styles.
        seconds: of training, the search for the rate included.
    """

    candidate: str
    seed: int
    rate: float
    alpha: float
    held_out: float
    style: float
    own: float
    shifts: float
    seconds: float

    @property
    def validation(self) -> float:
        """The mean of what may choose."""
        return (self.held_out + self.style) / 2


def measured(of: Set, candidate: str, seed: int, threads: int | None, folder: Path) -> Found:
    """Train by the recipe, choose α by its held-out images, and test."""
    began = time.monotonic()
    run = train(
        "small",
        architecture=f"local-dir:{BASE}",
        pretrained=None,
        data=of.draw(seed, folder),
        workers=0,
        threads=threads,
        tracker="none",
        save_every=None,
        seed=seed,
        out=folder / "run",
        **of.fields,
        **CANDIDATES[candidate],
    )
    seconds = time.monotonic() - began
    choice = evaluate(run, "auto", out=folder / "choice", threads=threads).choice
    assert choice is not None

    # The test sets, and the style for validation among them.
    suite = yaml.safe_load(of.suite.read_text(encoding="utf-8"))
    suite["sets"] = [
        {key: value for key, value in entry.items() if key != "split"}
        for entry in suite["sets"]
        if entry["name"] == of.style or entry.get("split") != "validation"
    ]
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite), encoding="utf-8")
    rows = evaluate(
        run,
        [choice.best],
        suite=path,
        data_root=of.root,
        limit=LIMIT,
        out=folder / "tested",
        threads=threads,
    ).rows
    figures = {row.dataset: own_metric(row) for row in rows}
    shifted = [row.dataset for row in rows if row.shift == "ood" and row.dataset != of.style]
    return Found(
        candidate,
        seed,
        rate=run.recipe.peak_rate,
        alpha=choice.best,
        held_out=next(
            100 * point["score"] for point in choice.curve if point["alpha"] == choice.best
        ),
        style=figures[of.style],
        own=next(figures[row.dataset] for row in rows if row.shift == "id"),
        shifts=mean(figures[name] for name in shifted),
        seconds=seconds,
    )


HEAD = [
    *("fields", "rates", "α", "held out", "style that chooses", "in distribution", "shifts"),
    *("lead, validation", "lead, in distribution", "lead, shifts", "time, s"),
]


def row_of(candidate: str, found: Sequence[Found], first: Sequence[Found]) -> list[str]:
    """A candidate in the table, beside the first one."""
    figures = [[(one.validation, one.own, one.shifts) for one in of] for of in (found, first)]
    return [
        candidate,
        ", ".join(f"{one.rate:.2g}" for one in found),
        ", ".join(f"{one.alpha:g}" for one in found),
        *(
            spread([getattr(one, name) for one in found])
            for name in ("held_out", "style", "own", "shifts")
        ),
        *(paired_leads(*figures) if found is not first else [""] * 3),
        f"{median(one.seconds for one in found):.0f}",
    ]


def small(
    set_name: Literal["drawings", "pacs"],
    data_root: Path,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    threads: int | None = None,
) -> None:
    """Train by the recipe `small` with and without its parts, let each run's held-out images choose
    the learning rate and α, and judge all on test sets; print it, write Markdown.

    Args:
        set_name: what to learn from.
        data_root: folder with drawings/ and pacs/.
        out: folder of small.md, and of the finished runs, which are not made again.
        seeds: each candidate learns once for each.
        threads: to compute with; one a core if none is given.
    """
    check_seeds(seeds)
    with tempfile.TemporaryDirectory() as folder:
        of = set_of(set_name, data_root.resolve(), Path(folder))
        # Runs that the file has are not made again.
        path = out / "small.json"  # the folder's *.jsonl are cells of tables
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        done = {(run["candidate"], run["seed"]): Found(**run) for run in kept}
        for seed, candidate in itertools.product(seeds, CANDIDATES):
            if (candidate, seed) in done:
                continue
            say(f"{candidate}, seed {seed}")
            with tempfile.TemporaryDirectory() as place:
                done[candidate, seed] = measured(of, candidate, seed, threads, Path(place))
            with staged(path) as temporary:
                runs = [vars(found) for found in done.values()]
                temporary.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    found = {candidate: [done[candidate, seed] for seed in seeds] for candidate in CANDIDATES}
    first = next(iter(found.values()))
    parts = [
        "# The recipe small, by its parts",
        f"`{command_line('rivals.small')}`, {datetime.date.today()}, {machine()}.\n"
        f"At most {of.shots} images of each of {len(of.images)} classes, a fifth of them held out;"
        f" the demo's base, rank 4, but for the row small, which has the recipe's own fields."
        f" Accuracy in %, mean ± standard deviation over the seeds, on"
        f" at most {LIMIT} images of a test set.\n"
        f"The held-out images choose the rate of auto, and α. They and {of.style.partition(',')[0]}"
        " choose between the rows, and are no test. A lead is over the first row, paired over the"
        " seeds, ± its 95 % interval. preserve is 10, with drop 0; all classes is negative_classes"
        " 1000.",
        markdown(HEAD, [row_of(candidate, runs, first) for candidate, runs in found.items()]),
    ]
    publish(parts, out / "small.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(small, argv, prog="python -m rivals.small")


if __name__ == "__main__":
    sys.exit(main())
