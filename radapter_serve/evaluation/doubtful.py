"""Training images whose label both the base and the tuned model doubt: the first to look at for
wrong labels.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.adapter import load_adapter
from radapter_serve.data.labelled import Labelled
from radapter_serve.data.runs import run_data
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import ClassificationSet, first_names
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.models import Candidate
from radapter_serve.evaluation.run import evaluate_scored
from radapter_serve.evaluation.sets import classification_set
from radapter_serve.evaluation.suite import Entry
from radapter_serve.files import staged

MAX_SHOWN = 48  # images of a picture
_COLUMNS = 8
_MAX_SCORES = 250_000_000  # of an image and a class, by each of two models
_FIELDS = ("image", "label", "base_says", "run_says", "base_margin", "run_margin")


@dataclass(frozen=True)
class Doubtful:
    """A training image whose label is in doubt.

    Attributes:
        image: what the data calls it, such as its path.
        label: of the data, by the first name of its class.
        base_says, run_says: the class that the base and the run find best, of the others.
        base_margin, run_margin: how much higher the cosine of that class is than the label's;
            negative where the label is higher.
        number: of the image in the data.
    """

    image: str
    label: str
    base_says: str
    run_says: str
    base_margin: float
    run_margin: float
    number: int


def margins(cosines: Floats, labels: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    """How much higher the best other class of each image is than its label, float32 [N], and that
    class, int64 [N]; from cosines [N, C] and labels [N].
    """
    rows = np.arange(len(labels))
    others = cosines.copy()
    others[rows, labels] = -np.inf
    best = others.argmax(axis=1)
    return others[rows, best] - cosines[rows, labels], best


def find_doubtful(
    run: Path,
    load: Callable[[Path, Sequence[float]], list[Candidate]],
    count: int,
    out: Path,
    batch_size: int,
    say: Callable[[str], None],
) -> tuple[list[Doubtful], list[Path]]:
    """Find the `count` training images whose label is most in doubt, the most doubtful first, and
    write `doubtful.csv` and `doubtful.png` into `out`.
    """
    # The run's images; those that it held out may have wrong labels, too.
    metadata = load_adapter(run).metadata
    source = metadata.source
    if metadata.task != "classification" or not source.data:
        raise RAdapterError(
            f"doubtful is for runs of labelled images; {run} was trained for {metadata.task}"
            f"{'' if source.data else ', and does not say from what'}"
        )
    plain = dataclasses.replace(source, val_data=None, val_fraction=0.0, streaming=False)
    say(f"reading {source.data}")
    data, _ = run_data(plain)
    assert isinstance(data, Labelled)
    if data.several:
        raise RAdapterError(
            f"doubtful needs one label an image, and {source.data} may have several"
        )
    entry = Entry(source.data, name=source.data, exif_orientation=source.exif_orientation)
    images = classification_set(entry, data)
    scores = len(images) * len(images.classes)
    if scores > _MAX_SCORES:
        raise RAdapterError(
            f"{source.data} has {len(images):,} images of {len(images.classes):,} classes, which"
            f" are {scores:,} scores; at most {_MAX_SCORES:,} are kept, so name a part of it as"
            " the data of a run"
        )

    # Their cosines with each class by the base and by the run.
    models = load(run, [0.0, 1.0])
    try:
        by_base, by_run = evaluate_scored(
            models,
            images,
            batch_size=batch_size,
            progress=lambda done, n: say(f"{done} of {n} images by both models"),
        )
    finally:
        models[0].close()
    assert by_base.cosines is not None and by_run.cosines is not None

    # The smaller margin is positive where both find another class better.
    base_margins, base_best = margins(by_base.cosines, images.labels)
    run_margins, run_best = margins(by_run.cosines, images.labels)
    order = np.argsort(-np.minimum(base_margins, run_margins), kind="stable")[:count]
    names = first_names(images.classes)
    doubts = [
        Doubtful(
            images.images[number].name,
            names[images.labels[number]],
            names[base_best[number]],
            names[run_best[number]],
            round(float(base_margins[number]), 4),
            round(float(run_margins[number]), 4),
            number,
        )
        for number in order.tolist()
    ]
    out.mkdir(parents=True, exist_ok=True)
    table = out / "doubtful.csv"
    with staged(table) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_FIELDS)
        writer.writerows([getattr(doubt, name) for name in _FIELDS] for doubt in doubts)
    return doubts, [table, _draw(doubts, images, out / "doubtful.png")]


def _draw(doubts: Sequence[Doubtful], images: ClassificationSet, path: Path) -> Path:
    shown = doubts[:MAX_SHOWN]
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(1.7 * _COLUMNS, 2.1 * rows), dpi=100, layout="constrained")
    for place, doubt in enumerate(shown, 1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        with Image.open(io.BytesIO(images.images[doubt.number]())) as image:
            image.thumbnail((200, 200))
            axes.imshow(image.convert("RGB"))
        axes.axis("off")
        says = doubt.run_says
        if says != doubt.base_says:
            says = f"{doubt.base_says} / {says}"
        # Names of classes are no formulas.
        axes.set_title(f"{doubt.label[:22]}\nor {says[:22]}?", fontsize=7, parse_math=False)
    with staged(path) as part:
        figure.savefig(part, format="png")
    return path
