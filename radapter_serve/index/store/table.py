"""A generation of an index in files that are mapped from the disk, of many images with the codes by
which FAISS finds the nearest.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow.types import is_integer, is_string

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.integrity import CHECKED_AT_OPEN, check_files
from radapter_serve.index.mapped import VECTORS, Mapped, Positions
from radapter_serve.index.met import Met, met_by
from radapter_serve.index.neighbours import CODES, Neighbours
from radapter_serve.index.store import EXACT, THUMBNAIL, Hit, plain

UNIT = 1e-3  # how far a length or a cosine may be from what it can be, by rounding
_ROUNDING = 1e-5  # of a cosine in float32
_MAX_CONDITIONS = 64  # whose rows are remembered
_MAX_BYTES = 32 << 20  # that they take


class Table:
    """The mapped files of a generation, to be searched; any number of searches at once.

    Args:
        name: of the index, for messages.
        folder: of the files.
        facts: of the index.
        complete: whether all files are compared with their digests, however large.
        checked: as in `check_files`.
        few: up to so many images that meet a condition are compared, all of them; of more, FAISS
            names candidates.

    Raises:
        DamagedFileError: a file is missing, or not as it was written.
        RAdapterError: a file does not hold what a search needs.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        facts: IndexFacts,
        *,
        complete: bool,
        checked: int = CHECKED_AT_OPEN,
        few: int = EXACT,
    ) -> None:
        self._name = name
        self._facts = facts
        self._few = few
        always = (VECTORS, CODES)
        check_files(folder, facts.searched, complete=complete, always=always, checked=checked)
        self._mapped = Mapped(folder, (facts.count, facts.plan.release.embed_dim))
        self._plain = {
            name
            for name, column in self._mapped.columns.items()
            if is_string(column.type) or is_integer(column.type)
        }
        self._nearest = Neighbours(folder, self._mapped.vectors) if facts.nearest else None
        room = max(1, min(_MAX_CONDITIONS, _MAX_BYTES // (facts.count // 8 + 8 * EXACT)))
        self._met = lru_cache(room)(self._evaluated)

    def rows(self, columns: list[str], batch: int) -> Iterator[Any]:
        return self._mapped.batches(columns, batch)

    def find(
        self, embedding: NDArray[np.float32], top_k: int, where: str | None, *, thumbnails: bool
    ) -> list[Hit]:
        met = None if where is None else self._met(where)
        with _search_errors(self._name):
            if self._nearest is None:
                found = self._exact(embedding, top_k, met)
            else:
                found = self._approximate(self._nearest, embedding, top_k, met)
            return self._hits(found, embedding, top_k, thumbnails=thumbnails)

    def embeddings(self, ids: list[str]) -> dict[str, NDArray[np.float32]]:
        with _search_errors(self._name):
            paths = self._mapped.columns["path"]
            met = pc.is_in(paths, pa.array(ids, paths.type))
            found = np.flatnonzero(met.to_numpy())
            names = self._mapped.values(["path"], found)["path"]
            return dict(zip(names, np.array(self._mapped.vectors[found]), strict=True))

    def _evaluated(self, where: str) -> Met:
        columns = {name: self._mapped.columns[name] for name in self._facts.columns}
        return met_by(where, columns, len(self._mapped))

    def _exact(self, embedding: NDArray[np.float32], top_k: int, met: Met | None) -> Positions:
        """Where the best hits lie, by comparing every embedding that meets the condition; more than
        `top_k` where rounding lets no one tell them from the last.
        """
        vectors = self._mapped.vectors
        if met is None:
            scores = vectors @ embedding
            return np.flatnonzero(_near(scores, top_k))
        among = met.positions
        if len(among) > len(vectors) // 8:  # to copy these takes longer than to compare all
            scores = (vectors @ embedding)[among]
        else:
            scores = vectors[among] @ embedding
        return among[_near(scores, top_k)]

    def _approximate(
        self, near: Neighbours, embedding: NDArray[np.float32], top_k: int, met: Met | None
    ) -> Positions:
        """Where the best hits of candidates lie; where few rows meet the condition, each is
        compared.
        """
        effort = self._facts.nearest
        assert effort is not None  # as there are neighbours
        if met is None:
            most = min(top_k, self._facts.count)
            found, _ = near.nearest(embedding, most, effort.nprobes, effort.candidates)
        elif met.count <= self._few:
            found, _ = near.best(embedding, met.positions, top_k)
        else:
            found, _ = near.nearest_of(embedding, top_k, effort.nprobes, effort.candidates, met)
        return found

    def _hits(
        self, found: Positions, embedding: NDArray[np.float32], top_k: int, *, thumbnails: bool
    ) -> list[Hit]:
        """The best of some images, by their cosines and then by their ids."""
        scores = cosines(self._mapped.vectors[found], embedding)
        ids = self._mapped.values(["path"], found)["path"]
        keys = (-np.nan_to_num(scores, nan=np.inf)).tolist()  # what is no score is seen and refused
        order = sorted(range(len(ids)), key=lambda one: (keys[one], ids[one]))[:top_k]
        names = [*self._facts.columns, *([THUMBNAIL] if thumbnails else [])]
        columns = self._mapped.values(names, found[order])
        images = columns.pop(THUMBNAIL) if thumbnails else [b""] * len(order)
        for name in columns.keys() - self._plain:
            columns[name] = [plain(value) for value in columns[name]]
        rows = zip(*columns.values(), strict=True)
        return [
            Hit(ids[one], float(scores[one]), dict(zip(columns, row, strict=True)), image or b"")
            for one, row, image in zip(order, rows, images, strict=True)
        ]


def cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of each vector with a query, by sums that don't depend on its place, so that
    equals score the same.

    Args:
        vectors: float32 [N, D], unit length.
        query: float32 [D], unit length.
    """
    return np.asarray((vectors * query).sum(axis=1), np.float32)


def _near(scores: NDArray[np.float32], top_k: int) -> NDArray[np.bool_]:
    """Which of all scores may be among the best."""
    if len(scores) <= top_k:
        return np.ones(len(scores), bool)
    return np.asarray(~(scores < np.partition(scores, -top_k)[-top_k] - _ROUNDING))


@contextlib.contextmanager
def _search_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        see = "unless it was replaced just now, see radapter-index verify"
        print(f"the index {name} could not be searched: {error}; {see}", file=sys.stderr)
        why = "a file is damaged; the server's log says why"
        raise TaskError(UNKNOWN_INDEX, f"the index {name} can't be searched: {why}") from None
