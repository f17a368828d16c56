"""`python -m rivals.shots`: methods trained on a few images."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from radapter_serve.cli import run as run_command
from radapter_serve.data.labelled import Labelled
from rivals.benchmark import Flags, check_seeds
from rivals.cells import Cells, Judged
from rivals.layout import markdown, origin, publish, say
from rivals.method import Cost, Learned, Method, Run, System
from rivals.radapter import r_adapter
from rivals.statistics import corrected, lead_over
from rivals.tables import AT_CHOSEN_RATE, METHODS, figures, images_of

ZERO_SHOT = "zero-shot"
# Fields that a benchmark may set for all methods.
SHARED = ("epochs", "steps", "batch_size", "crop_scale", "flip")


class ByExample(System):
    """A CLIP whose class embeddings are means of the text's and the training images' embeddings,
    both of unit length, as version 1.0.0 mixed labels with examples.
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
    """List the rows at fixed rates: the recipe's for R-Adapter, and for rivals those chosen
    with validation on all images.
    """
    few: dict[str, Any] = {"val_fraction": 0.0}
    return {
        ZERO_SHOT: METHODS["zero-shot"],
        "labels by example": LabelsByExample(),
        "LoRA, rank 2": AT_CHOSEN_RATE["LoRA"],
        "LoRA, rank 2, 0.019": AT_CHOSEN_RATE["LoRA, 0.019"],
        **{
            name: method
            for name, method in AT_CHOSEN_RATE.items()
            if name.startswith(("CLIP-SVD", "full", "WiSE-FT", "Mask-Fill"))
        },
        "R-Adapter, full rank": r_adapter("few-shot", rank=None, **few),
        "R-Adapter, the recipe small": r_adapter("small", **few),
    }


def shots(
    flags: tyro.conf.OmitArgPrefixes[Flags],
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    seeds: tuple[int, ...] = (0, 1, 2),
    only: tuple[str, ...] = (),
) -> None:
    """Train on a few images, and test; print the results, write Markdown and a picture.

    Args:
        flags: of all methods.
        shots: images of each class, drawn with the seed; larger numbers contain the smaller ones.
        seeds: each method is trained once for each seed.
        only: rows to make; by default all.
    """
    check_seeds(seeds)
    benchmark = flags.benchmark()
    known = {
        name: method for name, method in methods().items() if not only or name in (*only, ZERO_SHOT)
    }

    # Evaluate each method for each number of images; zero-shot, which takes no images, once.
    judged: dict[tuple[str, int], list[list[Judged]]] = {}
    for number, seed in product(shots, seeds):
        fields = {**benchmark.fields, "batch_size": 2, "shots": number}
        size = Run({**fields, "seed": seed}, flags.out).size
        fields["batch_size"] = min(benchmark.fields.get("batch_size", size), size)
        cells = Cells(replace(benchmark, fields=fields), flags.out, "shots", flags.limit, say)
        for name, method in known.items():
            if name == ZERO_SHOT and (number, seed) != (shots[0], seeds[0]):
                rows = judged[name, shots[0]][0]
            else:
                alphas = [1.0 if method.alpha is None else method.alpha]
                rows = cells.cell(f"{name}, {number} a class", method, seed, alphas).rows
            judged.setdefault((name, number), []).append(rows)
    values = {place: [figures(rows) for rows in of_seeds] for place, of_seeds in judged.items()}
    parts = {place: [images_of(rows) for rows in of_seeds] for place, of_seeds in judged.items()}

    def middle(head: str, name: str, number: int) -> float:
        return mean(row[head] for row in values[name, number])

    # Make two tables: for the trained style, and for the mean of the others.
    heads = list(values[ZERO_SHOT, shots[0]][0])[:2]
    places = [(head, name, number) for head, name, number in product(heads, known, shots)]
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
            for number in shots:
                lead = leads.get((head, name, number))
                after = "" if lead is None else f" ({lead})"
                line.append(f"{middle(head, name, number):.1f}{after}")
            lines.append(line)
        tables.append(markdown([head, *(f"{number} a class" for number in shots)], lines))

    # Draw one line for each method over the numbers.
    picture = flags.out / "shots.png"
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for panel, head in zip(figure.subplots(1, 2), heads, strict=True):
        panel.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
        for name in known:
            middles = [middle(head, name, number) for number in shots]
            style = {"marker": "o", "linestyle": ":"}
            if name == ZERO_SHOT:
                style = {"color": "black", "linestyle": "--"}
            elif name.startswith("R-Adapter"):
                style = {"marker": "s"}
            width = 2.5 if "small" in name else 1.2
            panel.plot(shots, middles, label=name, linewidth=width, **style)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_xticks(shots)
        panel.set_xlabel("images of each class")
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
            "# A few images of each class",
            f"{origin('rivals.shots')}\n"
            f"Benchmark {benchmark.name}, seeds {', '.join(map(str, seeds))}; all methods learn"
            f" with {', '.join(f'{key} {value}' for key, value in shown.items())}. Accuracies in"
            " %, the mean of the seeds, and in brackets the lead over zero-shot with its 95 %"
            f" interval over {over}. **Bold** survives Holm's correction over the page."
            " Nothing was chosen here: the rates and α were fixed before, those of rivals with"
            " validation on all images.",
            *tables,
        ],
        flags.out / "shots.md",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(shots, argv, prog="python -m rivals.shots")


if __name__ == "__main__":
    sys.exit(main())
