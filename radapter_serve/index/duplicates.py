"""Near-duplicates in an index: groups of them, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.index.index import Index
from radapter_serve.index.table import THUMBNAIL, UNIT, VECTOR, vectors_of

_TILE = 2048  # images that are compared with as many others at once
_ROUNDING = 1e-6  # of a cosine in float32: copies have 1, or a little less
_MAX_EDGES = 4_000_000  # pairs that are kept before they are put together
_BATCH = 4096  # rows read at once
MAX_ROWS = 100  # groups that a picture shows
MAX_COLUMNS = 8  # images of each group that it shows
_CELL = 128  # px of a thumbnail's side
_TEXT = 28  # px of the lines below it
_NAME_LENGTH = 20  # characters of an id below its thumbnail


@dataclass(frozen=True)
class Group:
    """Images that are nearly the same: their sorted ids, and of each the highest cosine with
    another image of the group.
    """

    ids: list[str]
    scores: list[float]


def find_duplicates(
    index: Index,
    threshold: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """Group images whose cosine is at least a threshold, and those that are joined by these, the
    largest group first. Every pair is compared.
    """
    check_threshold(threshold)
    ids: list[str] = []
    parts = [np.zeros((0, index.facts.plan.release.embed_dim), np.float32)]
    for batch in index.rows(["path", VECTOR], _BATCH):
        ids += batch["path"].to_pylist()
        parts.append(vectors_of(batch[VECTOR]))
    vectors = np.concatenate(parts)
    if not (np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT).all():
        raise RAdapterError(
            f"the index {index.folder} has an embedding without unit length; see: radapter-index"
            f" verify {index.folder}"
        )

    # Compare tile with tile. Pairs wait as edges of a graph until there are many.
    count = len(vectors)
    labels = np.arange(count)
    highest = np.full(count, -1, np.float32)
    edges: list[NDArray[np.int64]] = []
    for start in range(0, count, _TILE):
        rows = vectors[start : start + _TILE]
        for other in range(start, count, _TILE):
            scores = rows @ vectors[other : other + _TILE].T
            first, second = np.nonzero(scores >= threshold - _ROUNDING)
            apart = first + start < second + other
            pair = np.stack([first[apart] + start, second[apart] + other])
            cosines = scores[first[apart], second[apart]]
            np.maximum.at(highest, pair[0], cosines)
            np.maximum.at(highest, pair[1], cosines)
            edges.append(pair)
            if sum(part.shape[1] for part in edges) > _MAX_EDGES:
                labels = _joined(labels, edges)
                edges = []
        if progress is not None:
            progress(min(start + _TILE, count), count)
    labels = _joined(labels, edges)

    members: dict[int, list[int]] = {}
    for row in sorted(range(count), key=ids.__getitem__):
        members.setdefault(int(labels[row]), []).append(row)
    groups = [
        Group([ids[row] for row in rows], [float(highest[row]) for row in rows])
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


def _joined(labels: NDArray[np.int64], edges: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The group's number of each image, after more pairs are joined."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(labels)
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    known = np.stack([np.arange(count), firsts[inverse]])
    pairs = np.concatenate([known, *edges], axis=1)
    graph = coo_matrix((np.ones(pairs.shape[1], bool), pairs), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def write_groups(groups: Sequence[Group], path: Path) -> None:
    """Write a CSV file: a row for each image, with the number of its group, its id and score."""
    with staged(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "id", "score"])
        for number, group in enumerate(groups, 1):
            for id, score in zip(group.ids, group.scores, strict=True):
                writer.writerow([number, id, f"{score:.6f}"])


def write_picture(index: Index, groups: Sequence[Group], path: Path) -> None:
    """Draw the thumbnails of groups, at least one, a group a row: at most 100 groups, and 8 images
    of each; as .png or .jpg.
    """
    shown = groups[:MAX_ROWS]
    wanted = {id for group in shown for id in group.ids[:MAX_COLUMNS]}
    thumbnails: dict[str, bytes] = {}
    for batch in index.rows(["path", THUMBNAIL], _BATCH):
        for row, id in enumerate(batch["path"].to_pylist()):
            if id in wanted:
                thumbnails[id] = batch[THUMBNAIL][row].as_py()

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
            if thumbnails.get(id):
                with Image.open(io.BytesIO(thumbnails[id])) as thumbnail:
                    picture = thumbnail.convert("RGB")
                picture.thumbnail((_CELL - 4, _CELL - 4))
                sheet.paste(picture, (left + 2, top + 2))
            name = id.encode("ascii", "backslashreplace").decode()[-_NAME_LENGTH:]
            pen.text((left + 2, top + _CELL), f"{name}\n{score:.4f}", "black", font=font)
    with staged(path) as temporary:
        sheet.save(temporary, "PNG" if path.suffix == ".png" else "JPEG")
