"""`python -m rivals.small`: ablation of the recipe `small`, on a few hundred images."""

from __future__ import annotations

import csv
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
from rivals.benchmark import check_seeds
from rivals.layout import markdown, origin, paired_leads, publish, say, spread

PAPER: dict[str, Any] = {
    "rank": 4,
    "learning_rate": 5e-4,
    "drop": 0.2,
    "preserve": 0.0,
    "preserve_words": 0.0,
    "negative_classes": 0,
    "precision": "no",
}
CANDIDATES = {
    "5e-4": PAPER,
    "auto": {**PAPER, "learning_rate": "auto"},
    "small, fp32": {"precision": "no"},
    "small, bf16": {"precision": "bf16"},
}
LIMIT = 1000  # most images of a test set
CLASSES = 40  # number of classes of the drawings


@dataclass(frozen=True)
class Set:
    """Training images by class, of which a run draws `shots` each, and a suite of test sets.

    `root` is the folder of the suite's paths, and `style` the shifted set of the suite that is used
    for the choice, and not for the test.
    """

    images: dict[str, list[Path]]
    shots: int
    fields: dict[str, Any]
    suite: Path
    root: Path
    style: str

    def draw(self, seed: int, folder: Path) -> str:
        """Draw the images of a run; returns a table as `data` takes it."""
        chance = random.Random(seed)
        drawn = {
            label: chance.sample(images, min(self.shots, len(images)))
            for label, images in self.images.items()
        }
        return table_of(drawn, folder)


def table_of(images: Mapping[str, Iterable[Path]], folder: Path) -> str:
    """Write images by class as a table in a folder; returns the table as `data` takes it."""
    path = folder / "images.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label"])
        table.writerows([image, label] for label, paths in images.items() for image in paths)
    return f"csv:{path}"


def set_of(name: str, root: Path, folder: Path) -> Set:
    """Open the set drawings or pacs; drawings of a few classes are linked in `folder`."""
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
    """Link the drawings of the classes with the most training images."""
    sizes = {place.name: len(list(place.iterdir())) for place in (drawings / "train").iterdir()}
    kept = sorted(sizes, key=lambda name: (-sizes[name], name))[:CLASSES]
    lines = (drawings / "classes.txt").read_text(encoding="utf-8").splitlines()
    of_kept = [line for line in lines if split_label(line)[0] in kept]
    copy.mkdir(parents=True)
    (copy / "classes.txt").write_text("\n".join(of_kept), encoding="utf-8")
    shutil.copy(drawings / "templates.txt", copy)
    parts = [drawings / name for name in ("train", "val", "test")]
    for part in [*parts, *drawings.glob("shifts/*")]:
        folder = copy / part.relative_to(drawings)
        folder.mkdir(parents=True)
        for name in kept:
            if (part / name).exists():
                (folder / name).symlink_to(part / name, target_is_directory=True)


@dataclass(frozen=True)
class Outcome:
    """Accuracies of a run in %, and its choices."""

    candidate: str
    seed: int
    rate: float
    alpha: float  # the best on the held-out images
    held_out: float  # on the held-out images
    style: float  # on the style for the choice
    own: float  # on the test in distribution
    shifts: float  # mean over the other styles
    seconds: float  # of training, including the search for the rate

    @property
    def validation(self) -> float:
        """Mean over the sets for the choice."""
        return (self.held_out + self.style) / 2


def measure(data: Set, candidate: str, seed: int, threads: int | None, folder: Path) -> Outcome:
    """Train by the recipe, choose α on the held-out images, and test."""
    began = time.monotonic()
    run = train(
        "small",
        architecture=f"local-dir:{BASE}",
        pretrained=None,
        data=data.draw(seed, folder),
        workers=0,
        threads=threads,
        tracker="none",
        save_every=None,
        seed=seed,
        out=folder / "run",
        **data.fields,
        **CANDIDATES[candidate],
    )
    seconds = time.monotonic() - began
    choice = evaluate(run, "auto", out=folder / "choice", threads=threads).choice
    assert choice is not None

    # Test on all sets except validation in distribution.
    suite = yaml.safe_load(data.suite.read_text(encoding="utf-8"))
    suite["sets"] = [
        {key: value for key, value in entry.items() if key != "split"}
        for entry in suite["sets"]
        if entry["name"] == data.style or entry.get("split") != "validation"
    ]
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite), encoding="utf-8")
    rows = evaluate(
        run,
        [choice.best],
        suite=path,
        data_root=data.root,
        limit=LIMIT,
        out=folder / "tested",
        threads=threads,
    ).rows
    figures = {row.dataset: own_metric(row) for row in rows}
    scores = {point["alpha"]: point["score"] for point in choice.curve}
    shifted = [row.dataset for row in rows if row.shift == "ood" and row.dataset != data.style]
    return Outcome(
        candidate,
        seed,
        rate=run.recipe.peak_rate,
        alpha=choice.best,
        held_out=100 * scores[choice.best],
        style=figures[data.style],
        own=next(figures[row.dataset] for row in rows if row.shift == "id"),
        shifts=mean(figures[name] for name in shifted),
        seconds=seconds,
    )


HEAD = [
    *("fields", "rates", "α", "held out", "style that chooses", "in distribution", "shifts"),
    *("lead, validation", "lead, in distribution", "lead, shifts", "time, s"),
]


def row_of(candidate: str, runs: Sequence[Outcome], first: Sequence[Outcome]) -> list[str]:
    """Format the row of a candidate, with its leads over the first candidate."""
    figures = [[(run.validation, run.own, run.shifts) for run in row] for row in (runs, first)]
    return [
        candidate,
        ", ".join(f"{run.rate:.2g}" for run in runs),
        ", ".join(f"{run.alpha:g}" for run in runs),
        *(
            spread([getattr(run, name) for run in runs])
            for name in ("held_out", "style", "own", "shifts")
        ),
        *(paired_leads(*figures) if runs is not first else [""] * 3),
        f"{median(run.seconds for run in runs):.0f}",
    ]


def small(
    set_name: Literal["drawings", "pacs"],
    data_root: Path,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    threads: int | None = None,
) -> None:
    """Train by the recipe `small` with and without its parts, and test; print and write Markdown.

    Each run's held-out images choose the learning rate and α.

    Args:
        set_name: images to learn from.
        data_root: folder with drawings/ and pacs/.
        out: folder of small.md, and of the finished runs, which are not repeated.
        seeds: each candidate is trained once for each seed.
        threads: to compute with; by default one a core.
    """
    check_seeds(seeds)
    path = out / "small.json"  # not *.jsonl, which are cells of tables
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {(run["candidate"], run["seed"]): Outcome(**run) for run in kept}
    with tempfile.TemporaryDirectory() as folder:
        data = set_of(set_name, data_root.resolve(), Path(folder))
        for seed, candidate in itertools.product(seeds, CANDIDATES):
            if (candidate, seed) in done:
                continue
            say(f"{candidate}, seed {seed}")
            with tempfile.TemporaryDirectory() as place:
                done[candidate, seed] = measure(data, candidate, seed, threads, Path(place))
            with staged(path) as temporary:
                text = json.dumps([vars(run) for run in done.values()], indent=1)
                temporary.write_text(text, encoding="utf-8")
    rows = {candidate: [done[candidate, seed] for seed in seeds] for candidate in CANDIDATES}
    first = next(iter(rows.values()))
    parts = [
        "# The recipe small, by its parts",
        f"{origin('rivals.small')}\n"
        f"At most {data.shots} images of each of {len(data.images)} classes, a fifth of them held"
        " out; the demo's base, rank 4, but for the rows small, which have the recipe's own fields."
        " Accuracy in %, mean ± standard deviation over the seeds, on"
        f" at most {LIMIT} images of a test set.\n"
        f"The held-out images choose the rate of auto, and α. They and"
        f" {data.style.partition(',')[0]} choose between the rows, and are no test. A lead is over"
        " the first row, paired over the seeds, ± its 95 % interval.",
        markdown(HEAD, [row_of(candidate, runs, first) for candidate, runs in rows.items()]),
    ]
    publish(parts, out / "small.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(small, argv, prog="python -m rivals.small")


if __name__ == "__main__":
    sys.exit(main())
