"""`python -m rivals.shots`: what methods gain from a few images."""

from __future__ import annotations

import csv
import datetime
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from radapter_serve.cli import run as run_command
from radapter_serve.data.labelled import Labelled
from radapter_serve.errors import RAdapterError
from rivals.cells import Cells, Judged
from rivals.coop import CoOp
from rivals.flags import Flags, check_seeds
from rivals.layout import corrected, lead_of, markdown
from rivals.make import command_line, machine, publish, say
from rivals.maple import MaPLe
from rivals.mask_fill import MaskFill
from rivals.method import Method, with_rate
from rivals.methods import METHODS
from rivals.radapter import r_adapter
from rivals.run import Run
from rivals.small import table_of
from rivals.system import Cost, Learned, System
from rivals.tables import figures, images_of

ZERO_SHOT = "zero-shot"
PER_IMAGE = list[NDArray[np.float64]]  # what each image adds to a figure, of each set


class ByExample(System):
    """A CLIP whose classes are the mean of the text and of the images that show them, both of unit
    length, as `classify` mixes labels with examples.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.base)
        self.eval()
        transform = image_transform_v2(PreprocessCfg(**run.base.preprocess), is_train=False)
        assert isinstance(run.data, Labelled)
        sums = torch.zeros(len(run.data.classes), self.embed_texts(["a"]).shape[-1])
        with torch.inference_mode():
            for row in run.data.rows:
                image, labels, _ = run.data.pair(row, random.Random(0))
                [embeds] = self.embed_images(transform(image)[None])
                sums[labels if isinstance(labels, int) else labels[0]] += embeds.cpu()
        self.register_buffer("shown", F.normalize(sums, dim=-1).clone())
        self.shown: Tensor

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The embeddings of the training's classes, in their order."""
        texts = super().embed_classes(classes, templates)
        return F.normalize(texts + self.shown.to(texts), dim=-1)


class LabelsByExample(Method):
    """Labels by example, without training."""

    def start(self, run: Run) -> System:
        return ByExample(run)

    def learn(self, run: Run) -> Learned:
        return Learned(self.start(run), Cost())


def methods() -> dict[str, Method]:
    """The rows, each at a rate that was fixed before: the recipe's own, the papers' for a few
    images, and what validation chose for the main table of the drawings.
    """

    few: dict[str, Any] = {"val_fraction": 0.0}
    return {
        ZERO_SHOT: METHODS["zero-shot"],
        "labels by example": LabelsByExample(),
        "CoOp, no full stop": CoOp(words="{}"),
        "MaPLe, no full stop": MaPLe(words="a photo of a {}"),
        "CLIPood": METHODS["clipood"],
        "LoRA, rank 2": with_rate(METHODS["lora"], 6e-4),
        "full fine-tuning": with_rate(METHODS["ft"], 2.7e-4),
        "WiSE-FT": with_rate(METHODS["wise-ft"], 2.7e-4),
        "Mask-Fill": with_rate(MaskFill(weight=0.75), 9e-4),
        **{
            f"R-Adapter, rank {rank}": r_adapter("few-shot", rank=rank, **few) for rank in (1, 4, 8)
        },
        "R-Adapter, full rank": r_adapter("few-shot", rank=None, **few),
        "R-Adapter, the recipe small": r_adapter("small", **few),
    }


@dataclass(frozen=True)
class Result:
    """The accuracies in % of a method by a number of shots, of each seed by the heads of columns,
    and what each image adds to them.
    """

    values: Sequence[Mapping[str, float]]
    images: Sequence[Mapping[str, PER_IMAGE]]

    @classmethod
    def of(cls, seeds: Sequence[Sequence[Judged]]) -> Result:
        """The result of the judged sets of each seed."""
        return cls([figures(rows) for rows in seeds], [images_of(rows) for rows in seeds])

    def lead(self, other: Result, head: str) -> tuple[float, float, float]:
        """The lead over another result in a column, as `lead_of` has it."""
        pairs = list(zip(self.images, other.images, strict=True))
        return lead_of(
            [
                np.stack([own[head][place] - base[head][place] for own, base in pairs])
                for place in range(len(pairs[0][0][head]))
            ]
        )


def drawn_table(data: str, images: int, *, unequal: bool, seed: int, folder: Path) -> str:
    """Draw a table of so many images from a table, both as `data` takes them.

    Classes have as many images each as can be, or sizes that fall evenly, class by class, to a
    tenth of the first one's; the seed draws which class is large, among those that have enough.
    """
    reader, _, place = data.partition(":")
    if reader != "csv":
        raise RAdapterError(f"--images needs a benchmark whose data is csv:TABLE; this has {data}")
    by_class: dict[str, list[Path]] = {}
    with Path(place).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_class.setdefault(row["label"], []).append(Path(place).parent / row["image"])
    shares = np.geomspace(1, 0.1, len(by_class)) if unequal else np.ones(len(by_class))
    sizes = np.diff(np.rint(np.cumsum(shares) / shares.sum() * images), prepend=0).astype(int)
    largest_first = sorted((len(paths) for paths in by_class.values()), reverse=True)
    for size, most in zip(sorted(sizes, reverse=True), largest_first, strict=True):
        if size > most:
            raise RAdapterError(f"{images} images need {size} of a class; it has {most}")

    chance = random.Random(seed)
    classes = sorted(by_class)
    while True:
        chance.shuffle(classes)
        if all(size <= len(by_class[name]) for name, size in zip(classes, sizes, strict=True)):
            break
    drawn = {
        name: chance.sample(by_class[name], size) for name, size in zip(classes, sizes, strict=True)
    }
    folder.mkdir(parents=True, exist_ok=True)
    return table_of(drawn, folder)


def shots(
    flags: tyro.conf.OmitArgPrefixes[Flags],
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    images: tuple[int, ...] = (),
    unequal: bool = False,
    seeds: tuple[int, ...] = (0, 1, 2),
    only: tuple[str, ...] = (),
) -> None:
    """Learn from a few images and judge on the test sets; print it, write Markdown and a picture.

    Args:
        flags: of all methods.
        shots: images of each class, drawn by the seed; more of them hold the fewer.
        images: images in all, in place of shots.
        unequal: of --images, the largest class has ten times as many as the smallest.
        seeds: each method learns once for each.
        only: rows to make; all if none is given.
    """
    check_seeds(seeds)
    if unequal and not images:
        raise RAdapterError("--unequal divides a number of images; give it by --images")
    benchmark = flags.benchmark()
    known = {name: of for name, of in methods().items() if not only or name in (*only, ZERO_SHOT)}
    numbers = images or shots
    unit = "images" if images else "a class"
    kind = "unequal" if unequal else "equal"

    # Each method from each number of images; without training the images change nothing.
    judged: dict[tuple[str, int], list[list[Judged]]] = {}
    for number, seed in product(numbers, seeds):
        given = {**benchmark.given, "batch_size": 2}
        if images:
            folder = flags.out / "drawn" / f"{number}-{kind}-{seed}"
            data = str(given["data"])
            given["data"] = drawn_table(data, number, unequal=unequal, seed=seed, folder=folder)
        else:
            given["shots"] = number
        size = Run({**given, "seed": seed}, flags.out).size
        given["batch_size"] = min(benchmark.given.get("batch_size", size), size)
        cells = Cells(replace(benchmark, given=given), flags.out, "shots", flags.limit, say)
        for name, method in known.items():
            if name == ZERO_SHOT and (number, seed) != (numbers[0], seeds[0]):
                rows = judged[name, numbers[0]][0]
            else:
                alphas = [1.0 if method.alpha is None else method.alpha]
                rows = cells.cell(f"{name}, {number} {unit}", method, seed, alphas).rows
            judged.setdefault((name, number), []).append(rows)
    results = {place: Result.of(rows) for place, rows in judged.items()}

    # Two tables: the style that was learned, and the mean of the others.
    heads = list(results[ZERO_SHOT, numbers[0]].values[0])[:2]
    places = [(head, name, number) for head, name, number in product(heads, known, numbers)]
    leads = corrected(
        {
            (head, name, number): results[name, number].lead(results[ZERO_SHOT, number], head)
            for head, name, number in places
            if name != ZERO_SHOT
        }
    )
    tables = []
    for head in heads:
        lines = []
        for name in known:
            line = [name]
            for number in numbers:
                middle = mean(of[head] for of in results[name, number].values)
                lead = leads.get((head, name, number))
                line.append(f"{middle:.1f}" if lead is None else f"{middle:.1f} ({lead})")
            lines.append(line)
        tables.append(markdown([head, *(f"{number} {unit}" for number in numbers)], lines))

    # A line a method over the shots.
    picture = flags.out / "shots.png"
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for panel, head in zip(figure.subplots(1, 2), heads, strict=True):
        for name in known:
            middles = [mean(of[head] for of in results[name, number].values) for number in numbers]
            style = {"color": "grey", "linestyle": "--"} if name == ZERO_SHOT else {"marker": "o"}
            width = 2.5 if "small" in name else 1.2
            panel.plot(numbers, middles, label=name, linewidth=width, **style)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_xticks(numbers)
        panel.set_xlabel("images" if images else "images of each class")
        panel.set_ylabel("accuracy in %")
        panel.set_title(head, fontsize=10)
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    flags.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    say(f"wrote {picture}")

    shown = {key: value for key, value in benchmark.given.items() if key in LIKE}
    publish(
        [
            "# A few images" if images else "# A few images of each class",
            f"`{command_line('rivals.shots')}`, {datetime.date.today()}, {machine()}.\n"
            f"Benchmark {benchmark.name}, seeds {', '.join(map(str, seeds))}; all methods learn"
            f" with {', '.join(f'{key} {value}' for key, value in shown.items())}. Accuracies in"
            " %, the mean of the seeds, and in brackets the lead over zero-shot with its 95 %"
            " interval over images and seeds. **Bold** survives Holm's correction over the page."
            " Nothing was chosen here: the rates and α were fixed before.",
            *tables,
        ],
        flags.out / "shots.md",
    )


LIKE = ("epochs", "steps", "batch_size", "crop_scale", "flip")  # what a benchmark may give to all


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(shots, argv, prog="python -m rivals.shots")


if __name__ == "__main__":
    sys.exit(main())
