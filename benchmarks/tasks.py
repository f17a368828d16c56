"""What the tasks cost beside their encoders: masks, new labels, many images in a call."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro
from common import CLASS_NAMES, RESULTS, Report, alternate, clocked, picture, ratio
from numpy.typing import NDArray

from radapter_serve.contract.images import decode
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.encoders.labels import LabelCache
from radapter_serve.encoders.loaded import CHUNK, LoadedRelease, complete, release_at
from radapter_serve.tasks.dense import DenseSegmenter, encode_windows
from radapter_serve.tasks.embed import EmbedImagesRequest, embed_images, embed_labels

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
    segmenter = DenseSegmenter(preprocess, 64)
    patches = Patches()
    embeds = unit(np.random.default_rng(2).normal(size=(labels, WIDTH)))
    shortest = Preprocess((SIZE * 3 // 2,) * 2, resize_mode="shortest")
    values = np.full(BLOCK, -1.0, np.float32)
    result = np.empty(BLOCK, np.float32)

    def floor() -> None:
        shortest.resize(decode(image))
        for _ in range(0, 640 * 480 * labels, BLOCK):
            np.exp(values, out=result)

    def segment() -> None:
        encode_windows(segmenter.segment(decode(image), embeds), patches)

    return {"segment": segment, "floor": floor}


def new_labels(
    loaded: LoadedRelease, count: int, folder: Path
) -> Mapping[str, Callable[[], float]]:
    """New labels in the first process and in the second, and their prompts through the encoder
    alone; each in seconds.
    """
    numbers = itertools.count()
    template = "a photo of a {}."

    def labels() -> list[str]:
        run = next(numbers)
        names = itertools.product(CLASS_NAMES, CLASS_NAMES)
        return [f"{one} {other} {run}" for one, other in itertools.islice(names, count)]

    def encoder() -> float:
        rows = loaded.tokenizer.encode([template.replace("{}", label) for label in labels()])
        batches = [
            loaded.tokenizer.batch(some)
            for some in _batched(sorted(rows, key=len), loaded.release.max_batch_size)
        ]
        start = time.perf_counter()
        for batch in batches:
            loaded.encoder.tokens(batch)
        return time.perf_counter() - start

    def empty() -> None:
        # As a process finds it that has just begun.
        loaded.label_cache = LabelCache("", folder / "labels.sqlite")

    latest: list[list[str]] = []

    def first() -> float:
        latest[:] = [labels()]
        empty()
        start = time.perf_counter()
        complete(embed_labels(loaded, latest[0], [template]))
        return time.perf_counter() - start

    def second() -> float:
        if not latest:
            first()
        empty()
        start = time.perf_counter()
        complete(embed_labels(loaded, latest[0], [template]))
        return time.perf_counter() - start

    return {"encoder": encoder, "first": first, "second": second}


def many_images(loaded: LoadedRelease, count: int) -> Mapping[str, Callable[[], float]]:
    """Images in one call, and their pixels through the encoder alone; seconds an image."""
    images = [picture(640, 480, seed) for seed in range(count)]
    pixels = np.zeros((count, SIZE, SIZE, 3), np.uint8)

    def call() -> float:
        start = time.perf_counter()
        complete(embed_images(loaded, EmbedImagesRequest(images)))
        return (time.perf_counter() - start) / count

    def encoder() -> float:
        start = time.perf_counter()
        for first in range(0, count, CHUNK):
            loaded.encoder.images(pixels[first : first + CHUNK])
        return (time.perf_counter() - start) / count

    return {"call": call, "encoder": encoder}


def main(
    repository: Path,
    repeats: int = 9,
    labels: int = 1000,
    counts: tuple[int, ...] = (1, 4, 16, 64),
    out: Path = RESULTS,
) -> None:
    """Measure the tasks beside their encoders.

    Args:
        repository: a model repository with a release of ViT-B-32, whose weights may be random.
        repeats: rounds.
        labels: how many new ones.
        counts: images of a call.
        out: folder of the table.
    """
    report = Report(
        "tasks",
        "Tasks beside their encoders",
        "In this process, on one thread of numpy; encoders by two.",
    )
    rows = []
    for number in (2, 10, 100):
        candidates = segmentation(number)
        times = alternate({name: clocked(run) for name, run in candidates.items()}, repeats)
        rows.append([f"{number}", *_row(times, "floor", "segment")])
    report.table(
        "segment without its encoder, 640 x 480", ["labels", "floor, ms", "ms", "ratio"], rows
    )
    report.note(
        "Floor: the JPEG is decoded and resized as open_clip does it, and each pixel gets one"
        " exponential a label. The encoder's patches are given; ViT-B/32 has 7 x 7 in a window."
    )
    loaded = release_at({"model_repository": str(repository)})
    with tempfile.TemporaryDirectory() as folder:
        times = alternate(new_labels(loaded, labels, Path(folder)), max(3, repeats // 3))
    report.table(
        f"{labels} new labels, {loaded.release.precision}",
        ["process", "encoder alone, ms", "ms", "ratio"],
        [[name, *_row(times, "encoder", name)] for name in ("first", "second")],
    )
    rows = []
    for count in counts:
        times = alternate(many_images(loaded, count), max(3, repeats // 3))
        rows.append([f"{count}", *_row(times, "encoder", "call")])
    report.table(
        f"images of 640 x 480 in a call, {loaded.release.precision}",
        ["images", "encoder alone, ms an image", "ms an image", "ratio"],
        rows,
    )
    loaded.close()
    report.write(out)


def _batched(rows: Sequence[list[int]], size: int) -> list[Sequence[list[int]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _row(times: Mapping[str, Sequence[float]], floor: str, name: str) -> list[str]:
    return [
        f"{1e3 * statistics.median(times[floor]):.1f}",
        f"{1e3 * statistics.median(times[name]):.1f}",
        f"{ratio(times[name], times[floor]):.2f}",
    ]


if __name__ == "__main__":
    tyro.cli(main)
