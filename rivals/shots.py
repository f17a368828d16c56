"""`python -m rivals.shots`: methods trained on a few images."""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from radapter_serve.cli import run as run_command
from radapter_serve.data.labelled import Labelled
from radapter_serve.errors import RAdapterError
from rivals.benchmark import Flags, check_seeds, table_of
from rivals.cells import Cells, Judged
from rivals.layout import markdown, origin, publish, say
from rivals.method import Cost, Learned, Method, Run, System
from rivals.radapter import r_adapter
from rivals.statistics import corrected, lead_over
from rivals.tables import AT_CHOSEN_RATE, METHODS, NO_STOP, figures, images_of

ZERO_SHOT = "zero-shot"
# Fields that a benchmark may set for all methods.
SHARED = ("epochs", "steps", "batch_size", "crop_scale", "flip")


class ByExample(System):
    """A CLIP whose class embeddings are means of the text's and the training images' embeddings,
    both of unit length, as `classify` mixes labels with examples.
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
        """Embed the classes of the training data, in their order."""
        texts = super().embed_classes(classes, templates)
        return F.normalize(texts + self.shown.to(texts), dim=-1)


class LabelsByExample(Method):
    """Labels by example, without training."""

    def start(self, run: Run) -> System:
        return ByExample(run)

    def learn(self, run: Run) -> Learned:
        return Learned(self.start(run), Cost())


def methods() -> dict[str, Method]:
    """List the rows at fixed rates: the recipe's, the papers' for a few images, or those that
    validation chose for the main table of the drawings, and some also at those of PACS.
    """
    few: dict[str, Any] = {"val_fraction": 0.0}
    return {
        ZERO_SHOT: METHODS["zero-shot"],
        "labels by example": LabelsByExample(),
        **NO_STOP,
        "CLIPood": METHODS["clipood"],
        "LoRA, rank 2": AT_CHOSEN_RATE["LoRA"],
        "LoRA, rank 2, 0.019": AT_CHOSEN_RATE["LoRA, 0.019"],
        **{
            name: method
            for name, method in AT_CHOSEN_RATE.items()
            if name.startswith(("CLIP-SVD", "full", "WiSE-FT", "Mask-Fill"))
        },
        **{
            f"R-Adapter, rank {rank}": r_adapter("few-shot", rank=rank, **few) for rank in (1, 4, 8)
        },
        "R-Adapter, full rank": r_adapter("few-shot", rank=None, **few),
        "R-Adapter, the recipe small": r_adapter("small", **few),
    }


def drawn_table(data: str, images: int, *, unequal: bool, seed: int, folder: Path) -> str:
    """Draw `images` images from the table `data`; returns the new table as `data` takes it.

    Classes have equal sizes, or, if `unequal`, sizes that fall geometrically to a tenth of the
    first. The seed draws the order of the classes, among those orders in which every class has
    enough images.
    """
    reader, _, place = data.partition(":")
    if reader != "csv":
        raise RAdapterError(f"--images needs a benchmark whose data is csv:TABLE; this has {data}")

    # Read the table, and share the images among the classes.
    by_class: dict[str, list[Path]] = {}
    with Path(place).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_class.setdefault(row["label"], []).append(Path(place).parent / row["image"])
    shares = np.geomspace(1, 0.1, len(by_class)) if unequal else np.ones(len(by_class))
    sizes = np.diff(np.rint(np.cumsum(shares) / shares.sum() * images), prepend=0).astype(int)
    available = sorted((len(paths) for paths in by_class.values()), reverse=True)
    for size, most in zip(sorted(sizes, reverse=True), available, strict=True):
        if size > most:
            raise RAdapterError(f"{images} images need {size} of a class; it has {most}")

    # Draw the order of the classes, and their images.
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
    """Train on a few images, and test; print the results, write Markdown and a picture.

    Args:
        flags: of all methods.
        shots: images of each class, drawn with the seed; larger numbers contain the smaller ones.
        images: total number of images, in place of shots.
        unequal: with --images, the largest class has ten times as many as the smallest.
        seeds: each method is trained once for each seed.
        only: rows to make; by default all.
    """
    check_seeds(seeds)
    if unequal and not images:
        raise RAdapterError("--unequal divides a number of images; give it by --images")
    benchmark = flags.benchmark()
    known = {
        name: method for name, method in methods().items() if not only or name in (*only, ZERO_SHOT)
    }
    numbers = images or shots
    unit = "images" if images else "a class"
    kind = "unequal" if unequal else "equal"

    # Evaluate each method for each number of images; zero-shot, which takes no images, once.
    judged: dict[tuple[str, int], list[list[Judged]]] = {}
    for number, seed in product(numbers, seeds):
        fields = {**benchmark.fields, "batch_size": 2}
        if images:
            folder = flags.out / "drawn" / f"{number}-{kind}-{seed}"
            data = str(fields["data"])
            fields["data"] = drawn_table(data, number, unequal=unequal, seed=seed, folder=folder)
        else:
            fields["shots"] = number
        size = Run({**fields, "seed": seed}, flags.out).size
        fields["batch_size"] = min(benchmark.fields.get("batch_size", size), size)
        cells = Cells(replace(benchmark, fields=fields), flags.out, "shots", flags.limit, say)
        for name, method in known.items():
            if name == ZERO_SHOT and (number, seed) != (numbers[0], seeds[0]):
                rows = judged[name, numbers[0]][0]
            else:
                alphas = [1.0 if method.alpha is None else method.alpha]
                rows = cells.cell(f"{name}, {number} {unit}", method, seed, alphas).rows
            judged.setdefault((name, number), []).append(rows)
    values = {place: [figures(rows) for rows in of_seeds] for place, of_seeds in judged.items()}
    parts = {place: [images_of(rows) for rows in of_seeds] for place, of_seeds in judged.items()}

    def middle(head: str, name: str, number: int) -> float:
        return mean(row[head] for row in values[name, number])

    # Make two tables: for the trained style, and for the mean of the others.
    heads = list(values[ZERO_SHOT, numbers[0]][0])[:2]
    places = [(head, name, number) for head, name, number in product(heads, known, numbers)]
    leads = corrected(
        {
            (head, name, number): lead_over(parts[name, number], parts[ZERO_SHOT, number], head)
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
                lead = leads.get((head, name, number))
                after = "" if lead is None else f" ({lead})"
                line.append(f"{middle(head, name, number):.1f}{after}")
            lines.append(line)
        tables.append(markdown([head, *(f"{number} {unit}" for number in numbers)], lines))

    # Draw one line for each method over the numbers.
    picture = flags.out / "shots.png"
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for panel, head in zip(figure.subplots(1, 2), heads, strict=True):
        panel.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
        for name in known:
            middles = [middle(head, name, number) for number in numbers]
            style = {"marker": "o", "linestyle": ":"}
            if name == ZERO_SHOT:
                style = {"color": "black", "linestyle": "--"}
            elif name.startswith("R-Adapter"):
                style = {"marker": "s"}
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

    shown = {key: value for key, value in benchmark.fields.items() if key in SHARED}
    over = "images and seeds" if len(seeds) > 1 else "images alone"
    publish(
        [
            "# A few images" if images else "# A few images of each class",
            f"{origin('rivals.shots')}\n"
            f"Benchmark {benchmark.name}, seeds {', '.join(map(str, seeds))}; all methods learn"
            f" with {', '.join(f'{key} {value}' for key, value in shown.items())}. Accuracies in"
            " %, the mean of the seeds, and in brackets the lead over zero-shot with its 95 %"
            f" interval over {over}. **Bold** survives Holm's correction over the page."
            " Nothing was chosen here: the rates and α were fixed before.",
            *tables,
        ],
        flags.out / "shots.md",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(shots, argv, prog="python -m rivals.shots")


if __name__ == "__main__":
    sys.exit(main())
