"""Images of an index that are nearly the same: groups of them, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.index.index import Index
from radapter_serve.index.store import THUMBNAIL, vectors_of
from radapter_serve.index.store.table import UNIT

_TILE = 2048
_ROUNDING = 1e-6  # of a cosine in float32: copies have 1, or a little less
_MAX_EDGES = 4_000_000
_BATCH = 4096  # rows read at once
# groups, and images of each, that a picture shows
MAX_ROWS = 100
MAX_COLUMNS = 8
# px of a thumbnail's side, and of the lines below it
_CELL = 128
_TEXT = 28
_NAME_LENGTH = 20  # characters of an id below its thumbnail

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Group:
    """Images that are nearly the same.

    Args:
        ids: in their order.
        scores: of each, the highest cosine with another of the group.
    """

    ids: list[str]
    scores: list[float]


def find_duplicates(
    index: Index,
    threshold: float,
    progress: Callable[[int, int], None] | None = None,
    *,
    tile: int = _TILE,
    max_edges: int = _MAX_EDGES,
) -> list[Group]:
    """Put images together whose cosine is at least a threshold, and what is joined by these.

    Every pair is compared.

    Args:
        index: in a folder or on object storage.
        threshold: cosine, above 0 and at most 1.
        progress: called with the images compared and all.
        tile: how many images are compared with as many others at once.
        max_edges: how many pairs are kept before they are put together.

    Returns:
        The groups of two images and more, the largest first, then by their first ids.

    Raises:
        RAdapterError: the threshold is not allowed, or the index can't be read.
    """
    check_threshold(threshold)
    ids, vectors = _read(index)
    best = np.full(len(ids), -1, np.float32)
    labels = _joined(vectors, threshold, best, progress, tile=tile, max_edges=max_edges)
    members: dict[int, list[int]] = {}
    for row in sorted(range(len(ids)), key=ids.__getitem__):
        members.setdefault(int(labels[row]), []).append(row)
    groups = [
        Group([ids[row] for row in rows], [float(best[row]) for row in rows])
        for rows in members.values()
        if len(rows) > 1
    ]
    return sorted(groups, key=lambda group: (-len(group.ids), group.ids[0]))


def check_threshold(threshold: float) -> None:
    """Raise a `RAdapterError` for a threshold that is not allowed."""
    if not 0 < threshold <= 1:
        raise RAdapterError(
            f"--threshold is {threshold:g}; allowed are cosines above 0 and up to 1, such as 0.95"
        )


def check_thumbnails(index: Index) -> None:
    """Raise a `RAdapterError` for an index that has no thumbnails to draw."""
    if not index.facts.plan.thumbnails:
        raise RAdapterError(
            f"the index {index.folder} has no thumbnails to draw; leave out --picture, or build it"
            " with --thumbnails 128"
        )


def _read(index: Index) -> tuple[list[str], Vectors]:
    ids: list[str] = []
    parts = [np.zeros((0, index.facts.plan.release.embed_dim), np.float32)]
    for batch in index.rows(["path", "vector"], _BATCH):
        ids += batch.column("path").to_pylist()
        parts.append(vectors_of(batch.column("vector")))
    vectors = np.concatenate(parts)
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) < UNIT).all():
        raise RAdapterError(
            f"the index {index.folder} has an embedding without unit length; see: radapter-index"
            f" verify {index.folder}"
        )
    return ids, vectors


def _joined(
    vectors: Vectors,
    threshold: float,
    best: Vectors,
    progress: Callable[[int, int], None] | None,
    *,
    tile: int = _TILE,
    max_edges: int = _MAX_EDGES,
) -> NDArray[np.int64]:
    """The number of the group of each image; `best` takes the highest cosine of each."""
    count = len(vectors)
    labels = np.arange(count)
    edges: list[NDArray[np.int64]] = []
    waiting = 0
    for start in range(0, count, tile):
        rows = vectors[start : start + tile]
        for other in range(start, count, tile):
            scores = rows @ vectors[other : other + tile].T
            first, second = np.nonzero(scores >= threshold - _ROUNDING)
            apart = first + start < second + other
            first = first[apart]
            second = second[apart]
            found = scores[first, second]
            np.maximum.at(best, first + start, found)
            np.maximum.at(best, second + other, found)
            edges.append(np.stack([first + start, second + other]))
            waiting += len(first)
            if waiting > max_edges:
                labels = _components(labels, edges)
                edges = []
                waiting = 0
        if progress is not None:
            progress(min(start + tile, count), count)
    return _components(labels, edges)


def _components(labels: NDArray[np.int64], edges: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The groups after more images are joined."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(labels)
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    known = np.stack([np.arange(count), firsts[inverse]])
    pairs = np.concatenate([known, *edges], axis=1)
    graph = coo_matrix((np.ones(pairs.shape[1], bool), pairs), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def write_table(groups: Sequence[Group], path: Path) -> None:
    """Write a CSV file: a row for each image, with the number of its group, its id and score."""
    with staged(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "id", "score"])
        for number, group in enumerate(groups, 1):
            for id, score in zip(group.ids, group.scores, strict=True):
                writer.writerow([number, id, f"{score:.6f}"])


def write_picture(index: Index, groups: Sequence[Group], path: Path) -> None:
    """Draw the thumbnails of groups, one group a row: at most 100 groups, and 8 images of each.

    Args:
        index: that has them.
        groups: from `find_duplicates`, at least one.
        path: .png or .jpg.
    """
    shown = groups[:MAX_ROWS]
    wanted = {id for group in shown for id in group.ids[:MAX_COLUMNS]}
    thumbnails = dict(_thumbnails(index, wanted))
    width = max(min(len(group.ids), MAX_COLUMNS) for group in shown)
    height = _CELL + _TEXT
    sheet = Image.new("RGB", (width * _CELL, len(shown) * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for row, group in enumerate(shown):
        pairs = zip(group.ids, group.scores, strict=True)
        for column, (id, score) in enumerate(list(pairs)[:MAX_COLUMNS]):
            left = column * _CELL
            top = row * height
            picture = thumbnails.get(id)
            if picture is not None:
                picture.thumbnail((_CELL - 4, _CELL - 4))
                sheet.paste(picture, (left + 2, top + 2))
            name = id.encode("ascii", "backslashreplace").decode()[-_NAME_LENGTH:]
            pen.text((left + 2, top + _CELL), f"{name}\n{score:.4f}", "black", font=font)
    with staged(path) as temporary:
        sheet.save(temporary, "PNG" if path.suffix == ".png" else "JPEG")


def _thumbnails(index: Index, wanted: set[str]) -> Iterator[tuple[str, Image.Image]]:
    for batch in index.rows(["path", THUMBNAIL], _BATCH):
        names = batch.column("path").to_pylist()
        for place, id in enumerate(names):
            if id in wanted:
                data: Any = batch.column(THUMBNAIL)[place].as_py()
                if data:
                    yield id, Image.open(io.BytesIO(data)).convert("RGB")
