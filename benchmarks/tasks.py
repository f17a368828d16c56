"""What the tasks cost beside their encoders: masks, new labels, many images in a call."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from common import RESULTS, Report, alternate, clocked, picture, ratio
from numpy.typing import NDArray

from radapter_serve.contract.preprocess import Preprocess, decode
from radapter_serve.tasks.dense import DenseSegmenter

WIDTH = 512
SIZE = 224
GRID = 7
BLOCK = 2**18  # values of the floor's exponentials at once, 1 MiB


def unit(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows of unit length."""
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True), np.float32)


class Patches:
    """A patch encoder that takes no time: embeddings that change smoothly, the same each time."""

    def __init__(self) -> None:
        self._known: dict[int, NDArray[np.float32]] = {}
        self._weight = np.random.default_rng(0).normal(size=(3, WIDTH))

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] -> float32 [B, g, g, D]."""
        if len(pixels) not in self._known:
            step = SIZE // GRID
            means = pixels.reshape(len(pixels), GRID, step, GRID, step, 3).mean((2, 4)) / 255
            noise = np.random.default_rng(1).normal(size=(len(pixels), GRID, GRID, WIDTH))
            self._known[len(pixels)] = unit(np.sin(3 * means @ self._weight) + 0.1 * noise)
        return self._known[len(pixels)]


def segmentation(labels: int) -> Mapping[str, Callable[[], object]]:
    """`segment` without its encoder, and the least that it has to do."""
    image = picture(640, 480)
    preprocess = Preprocess((SIZE, SIZE))
    segmenter = DenseSegmenter(Patches(), preprocess, 64)
    embeds = unit(np.random.default_rng(2).normal(size=(labels, WIDTH)))
    shortest = Preprocess((SIZE * 3 // 2,) * 2, resize_mode="shortest")
    values = np.full(BLOCK, -1.0, np.float32)
    result = np.empty(BLOCK, np.float32)

    def floor() -> None:
        shortest.resize(decode(image))
        for _ in range(0, 640 * 480 * labels, BLOCK):
            np.exp(values, out=result)

    return {"segment": lambda: segmenter(decode(image), embeds), "floor": floor}


def main(repeats: int = 9, out: Path = RESULTS) -> None:
    """Measure the tasks beside their encoders.

    Args:
        repeats: rounds.
        out: folder of the table.
    """
    report = Report(
        "tasks",
        "Tasks beside their encoders",
        "In this process, on one thread of numpy where nothing else is said.",
    )
    rows = []
    for labels in (2, 10, 100):
        candidates = segmentation(labels)
        times = alternate({name: clocked(run) for name, run in candidates.items()}, repeats)
        rows.append(
            [
                f"{labels}",
                f"{1e3 * statistics.median(times['floor']):.1f}",
                f"{1e3 * statistics.median(times['segment']):.1f}",
                f"{ratio(times['segment'], times['floor']):.2f}",
            ]
        )
    report.table(
        "segment without its encoder, 640 x 480", ["labels", "floor, ms", "ms", "ratio"], rows
    )
    report.note(
        "Floor: the JPEG is decoded and resized as open_clip does it, and each pixel gets one"
        " exponential a label. The encoder's patches are given; ViT-B/32 has 7 x 7 in a window."
    )
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
