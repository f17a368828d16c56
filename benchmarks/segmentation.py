"""Masked crops: how often the class of a segment is right, before and after training, over α."""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from radapter_serve.adapter import attach_adapter, load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.data import load_masked
from radapter_serve.data.segments import load_segments
from radapter_serve.evaluation.classification import (
    count_hits,
    evaluation_batches,
    zero_shot_classifier,
)


def main(
    adapter: Path,
    data: str,
    classes: Path | None = None,
    images: Path | None = None,
    alphas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    min_area: int | None = None,
) -> None:
    """Accuracy of masked crops at several α; 0 is the model before training.

    Args:
        adapter: a run's folder, whose recipe says how segments are cropped.
        data: masks:DIR or coco:FILE.json.
        classes: file of the class ids.
        images: folder of the images.
        alphas: re-scaling α.
        min_area: pixels below which a segment is left out; none takes the recipe's.
    """
    found = load_adapter(adapter)
    metadata = found.metadata
    base = load_base(metadata.architecture, metadata.pretrained)
    adapters = attach_adapter(base.model, found, 1.0)
    segments = load_segments(
        load_masked(data, classes=classes, images=images),
        metadata.source.mask_crop(base.preprocess["mean"]),
        min_area=metadata.source.mask_min_area if min_area is None else min_area,
        templates=metadata.templates,
    )
    batches = list(
        evaluation_batches(
            base, segments.rows, lambda row: (segments.image(row), segments.label(row))
        )
    )
    labels = torch.cat([label for _, label in batches])
    most = int(labels.bincount().max())
    table = Table(
        "α",
        "accuracy of crops, %",
        title=f"{len(labels)} segments, {len(segments.classes)} classes",
    )
    for alpha in alphas:
        adapters.alpha = alpha
        classifier = zero_shot_classifier(
            base.model, base.tokenizer, segments.classes, segments.templates
        )
        hits, total = count_hits(base.model, classifier, batches)
        table.add_row(f"{alpha:g}", f"{100 * hits / total:.2f}")
    table.caption = f"always the most frequent class: {100 * most / len(labels):.2f} %"
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
