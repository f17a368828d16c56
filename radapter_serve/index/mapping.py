"""Maps an index to another image tower with a linear map, fitted on a sample of its images, so that
it is searched before all images are embedded again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.index.collection import Progress, Read, read
from radapter_serve.index.facts import MadeBy, Mapped
from radapter_serve.index.folder import VECTOR, FolderIndex, vector_column, vectors_of
from radapter_serve.index.neighbours import TEXTS, TOP_K
from radapter_serve.index.qdrant import refuse_link
from radapter_serve.index.writer import BATCH, building, write_generation
from radapter_serve.process import decoders

_SAMPLE = 1000  # most images embedded by both towers, drawn at random
LEAST_RECALL = 0.8
_FEWEST = 100  # images in a sample
_FOLDS = 5
# Weight of the distance from the orthogonal map, relative to the mean variance of a direction;
# at infinity the map is orthogonal, near 0 that of least squares.
_STRENGTHS = (math.inf, 1.0, 0.1, 0.01)
_QUERIES = 1000  # most images of the sample that the recall searches with
_ROUNDING = 1e-5  # of a cosine in float32
_ROWS = 4096  # rows mapped at once

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """An affine map of embeddings [N, D] to [N, E], made unit length."""

    matrix: Floats  # [D, E]
    before: Floats  # mean of the embeddings [D]
    after: Floats  # mean of the mapped ones [E]

    def __call__(self, vectors: NDArray[np.float32] | Floats) -> NDArray[np.float32]:
        mapped = (vectors - self.before) @ self.matrix + self.after
        lengths = np.linalg.norm(mapped, axis=1, keepdims=True)
        return np.asarray(mapped / np.maximum(lengths, 1e-12), np.float32)


def fit(old: Floats, new: Floats) -> LinearMap:
    """Fit the map from embeddings [N, D] to those of the same images in another tower [N, E]: ridge
    around the orthogonal map, as strong as is best on a fifth of the pairs.
    """
    held = len(old) // _FOLDS
    errors = []
    for candidate in _fit_each(old[held:], new[held:]):
        cosines = (candidate(old[:held]) * new[:held]).sum(axis=1)
        errors.append(1 - cosines.mean())
    return _fit_each(old, new)[int(np.argmin(errors))]


def _fit_each(old: Floats, new: Floats) -> list[LinearMap]:
    """Fit the map of each strength."""
    before = old.mean(axis=0)
    after = new.mean(axis=0)
    a = old - before
    b = new - after
    # The orthogonal map (Procrustes), and the least squares of what it leaves
    u, _, vt = np.linalg.svd(a.T @ b, full_matrices=False)
    orthogonal = u @ vt
    variances, directions = np.linalg.eigh(a.T @ a)
    variances = np.maximum(variances, 1e-12)
    rest = directions.T @ (a.T @ (b - a @ orthogonal))
    maps = []
    for strength in _STRENGTHS:
        weights = 1 / (variances + strength * variances.mean())
        change = directions @ (weights[:, None] * rest)
        maps.append(LinearMap(orthogonal + change, before, after))
    return maps


def held_out_recall(old: Floats, new: Floats, texts: Floats) -> tuple[float, float]:
    """Recall@10 of a search with an image and with a text among mapped embeddings of images that
    the fit did not see, against the search among the embeddings of the new tower.
    """
    mapped = np.empty_like(new)
    fold = np.arange(len(old)) % _FOLDS
    for number in range(_FOLDS):
        seen = fold != number
        mapped[~seen] = fit(old[seen], new[seen])(old[~seen])

    recalls = []
    queries = np.arange(min(len(new), _QUERIES))
    for asked in (new[queries], texts):
        exact = asked @ new.T
        approximate = asked @ mapped.T
        if asked is not texts:  # an image does not find itself
            exact[queries, queries] = -math.inf
            approximate[queries, queries] = -math.inf
        tenth = -np.sort(-exact, axis=1)[:, TOP_K - 1 : TOP_K] - _ROUNDING
        hits = np.argsort(-approximate, axis=1)[:, :TOP_K]
        recalls.append(float((np.take_along_axis(exact, hits, axis=1) >= tenth).mean()))
    return recalls[0], recalls[1]


def map_index(
    out: Path,
    loaded: LoadedRelease,
    *,
    min_recall: float = LEAST_RECALL,
    progress: Progress | None = None,
) -> Mapped:
    """Map all embeddings of an index to the image tower of another release, atomically; raises an
    error if the recall on held-out images is lower than `min_recall`.
    """
    out = out.absolute()
    if not 0 <= min_recall <= 1:
        raise RAdapterError(f"--min-recall is {min_recall:g}; allowed: 0 to 1")
    refuse_link(out)
    with building(out) as folder:
        index = FolderIndex(out, complete=True, codes=False)
        plan = index.facts.plan
        again = f"build the index again ({index.facts.cost}): {plan.command(out, loaded)}"
        if plan.rows:
            raise RAdapterError(f"the index {out} was made of embeddings, without images; {again}")
        loaded = loaded.turned(plan.exif_orientation)
        if plan.release.is_of(loaded.release):
            raise RAdapterError(
                f"the index {out} is of this release's image tower: search it as it is"
            )

        # Measure the recall on a sample, and fit the map on all its pairs.
        start = time.monotonic()
        rows, embeds = _embed_sample(index, loaded, again, progress)
        rate = len(rows) / max(time.monotonic() - start, 1e-3)
        old = np.asarray(index.vectors[rows], np.float64)
        new = embeds.astype(np.float64)
        texts = np.asarray(loaded.embed_texts(TEXTS), np.float64)
        by_image, by_text = held_out_recall(old, new, texts)
        mapped = Mapped(plan.release, len(rows), by_image, by_text)
        if mapped.recall < min_recall:
            raise RAdapterError(
                f"a map of the index {out} finds {by_image:.0%} of the ten nearest with images and"
                f" {by_text:.0%} with texts, and --min-recall is {min_recall:g}; {again}"
            )
        linear = fit(old, new)

        def batches() -> Iterator[pa.RecordBatch]:
            names = [*index.schema.names, VECTOR]
            for batch in index.rows(names, _ROWS):
                columns = dict(zip(names, batch.columns, strict=True))
                columns[VECTOR] = vector_column(linear(vectors_of(columns[VECTOR])))
                yield pa.record_batch(list(columns.values()), names)

        made_by = MadeBy.of(loaded.release)
        plan = dataclasses.replace(plan, release=made_by, origin=dict(loaded.origin))
        facts = dataclasses.replace(index.facts, plan=plan, rate=rate, mapped=mapped)
        write_generation(folder, out, facts, batches(), loaded)
    return mapped


def _embed_sample(
    index: FolderIndex, loaded: LoadedRelease, again: str, progress: Progress | None
) -> tuple[list[int], NDArray[np.float32]]:
    """Embed some images of an index, of which each file is as it was, and is there once; returns
    their rows and embeddings.
    """
    drawn = np.random.default_rng(0).permutation(len(index))[:_SAMPLE]
    known = index.table(["path", "digest"]).take(pa.array(drawn)).to_pylist()
    rows: list[int] = []
    embeds: list[NDArray[np.float32]] = []
    digests: set[str] = set()

    def read_one(row: dict[str, str]) -> Read:
        file = Path(index.facts.plan.root) / row["path"]
        return read(row["path"], file, "", loaded, 0)

    with ThreadPoolExecutor(decoders(8), thread_name_prefix="decode") as pool:
        for first in range(0, len(known), BATCH):
            batch = known[first : first + BATCH]
            prepared = []
            for number, image in enumerate(pool.map(read_one, batch), first):
                same = image.digest == known[number]["digest"]
                if not image.error and same and image.digest not in digests:
                    digests.add(image.digest)
                    rows.append(int(drawn[number]))
                    prepared.append(image.prepared)
            if prepared:
                embeds.append(loaded.embed_pixels(prepared))
            if progress is not None:
                progress(first + len(batch), len(known))
    if len(rows) < _FEWEST:
        raise RAdapterError(
            f"of {len(known):,} images of the index {index.folder} {len(rows):,} can be read,"
            f" differ and are as they were, and a map needs {_FEWEST}; {again}"
        )
    return rows, np.concatenate(embeds)
