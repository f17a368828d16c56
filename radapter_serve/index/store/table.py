"""A generation of an index in a LanceDB table, with the files by which FAISS finds the nearest of
many images.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError, invalid, public
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.index.condition import check_condition
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.neighbours import Neighbours
from radapter_serve.index.store import EXACT, THUMBNAIL, Hit, plain, vectors_of

UNIT = 1e-3  # how far a length or a cosine may be from what it can be, by rounding
_ROUNDING = 1e-5  # of a cosine in float32
_KEY = re.compile(r"s3://\S+|\S*\bg-[0-9a-f]{16}\S*")  # of an object


class Table:
    """A LanceDB table, to be searched; any number of searches at once.

    Args:
        name: of the index, for messages.
        table: of LanceDB.
        facts: of the index.
        nearest: what names candidates; None where every vector is compared.
    """

    def __init__(
        self, name: str, table: Any, facts: IndexFacts, nearest: Neighbours | None
    ) -> None:
        self._name = name
        self._table = table
        self._facts = facts
        self._nearest = nearest

    def rows(self, columns: list[str], batch: int) -> Iterator[Any]:
        return iter(self._table.search().select(columns).to_batches(batch))

    def find(
        self, embedding: NDArray[np.float32], top_k: int, where: str | None, *, thumbnails: bool
    ) -> list[Hit]:
        condition = None if where is None else check_condition(where)
        columns = [*self._facts.columns, *([THUMBNAIL] if thumbnails else [])]
        with _search_errors(self._name, where, self._facts.columns):
            return [
                _hit(row, score) for row, score in self._found(embedding, top_k, condition, columns)
            ]

    @cached_property
    def _vectors(self) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """LanceDB's row ids [N] and the embeddings, float32 [N, D], in the order of the images'
        ids.

        They are read at the first exact search, for numpy compares several times as fast as
        LanceDB: at most EXACT of them (41 MB where D is 512) stay in memory until the index is
        replaced.

        Raises:
            RAdapterError: one has not unit length.
        """
        table = (
            self._table.search()
            .select(["path", "vector"])
            .with_row_id(True)
            .to_arrow()
            .sort_by("path")
        )
        vectors = vectors_of(table["vector"])
        lengths = np.linalg.norm(vectors, axis=1)
        if not (abs(lengths - 1) < UNIT).all():
            raise RAdapterError("a vector has not unit length, so its file is damaged")
        return table["_rowid"].to_numpy(), vectors

    def _found(
        self, embedding: NDArray[np.float32], top_k: int, condition: str | None, columns: list[str]
    ) -> Iterator[tuple[dict[str, Any], float]]:
        """The best hits, with their rows of the table."""
        met = None if condition is None else self._met(condition)
        if self._nearest is None:
            found = self._exact(embedding, top_k, met)
        else:
            found = self._approximate(self._nearest, embedding, top_k, met)
        if len(found) > top_k:
            found = self._first(found, embedding, top_k)
        if len(found):
            rows = self._rows(found, [*columns, "vector"])
            scores = cosines(vectors_of(rows["vector"]), embedding)
            yield from zip(
                rows.drop_columns(["vector", "_rowid"]).to_pylist(), scores.tolist(), strict=True
            )

    def _met(self, condition: str) -> NDArray[np.uint64]:
        """The row ids that meet a condition."""
        found = self._table.search().where(condition).select(["_rowid"]).to_arrow()["_rowid"]
        return np.asarray(found.to_numpy(), np.uint64)

    def _rows(self, ids: NDArray[np.uint64], columns: list[str]) -> Any:
        """Rows of the table in Arrow's form, in any order."""
        return self._table.take_row_ids(ids.tolist()).select(columns).with_row_id().to_arrow()

    def _exact(
        self, embedding: NDArray[np.float32], top_k: int, met: NDArray[np.uint64] | None
    ) -> NDArray[np.uint64]:
        """Row ids of the best hits by comparing every embedding that meets the condition."""
        ids, vectors = self._vectors
        if met is not None:
            which = np.isin(ids, met)
            ids = ids[which]
            vectors = vectors[which]
        scores = vectors @ embedding
        if len(scores) > top_k:
            near = scores >= np.partition(scores, -top_k)[-top_k] - _ROUNDING
            ids = ids[near]
            scores = cosines(vectors[near], embedding)
        return np.asarray(ids[np.argsort(-scores, kind="stable")[:top_k]], np.uint64)

    def _approximate(
        self,
        near: Neighbours,
        embedding: NDArray[np.float32],
        top_k: int,
        met: NDArray[np.uint64] | None,
    ) -> NDArray[np.uint64]:
        """Row ids of the best hits of candidates; where few rows meet the condition, each is
        compared.
        """
        effort = self._facts.nearest
        assert effort is not None  # as there are neighbours
        if met is None:
            best, _ = near.nearest(
                embedding, min(top_k, self._facts.count), effort.nprobes, effort.candidates
            )
            return near.rows_of(best)
        among = near.positions(met)
        if len(among) <= EXACT:
            best, _ = near.best(embedding, among, top_k)
        else:
            best, _ = near.nearest_of(embedding, top_k, effort.candidates, among)
        return near.rows_of(best)

    def _first(
        self, found: NDArray[np.uint64], embedding: NDArray[np.float32], top_k: int
    ) -> NDArray[np.uint64]:
        """The best of more rows than are asked for, by their cosines and then by the images'
        ids.
        """
        rows = self._rows(found, ["path", "vector"]).sort_by("path")
        scores = cosines(vectors_of(rows["vector"]), embedding)
        return np.asarray(
            rows["_rowid"].to_numpy()[np.argsort(-scores, kind="stable")[:top_k]], np.uint64
        )


def cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of each vector with a query, by sums that don't depend on its place, so that
    equals score the same.

    Args:
        vectors: float32 [N, D], unit length.
        query: float32 [D], unit length.
    """
    return np.asarray((vectors * query).sum(axis=1), np.float32)


@contextlib.contextmanager
def _search_errors(name: str, where: str | None, columns: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of LanceDB's is no Exception
        if where is None:
            see = "unless it was replaced just now, see radapter-index verify"
            print(f"the index {name} could not be searched: {error}; {see}", file=sys.stderr)
            why = "its storage does not answer, or a file is damaged; the server's log says why"
            raise TaskError(UNKNOWN_INDEX, f"the index {name} can't be searched: {why}") from None
        why = public(_KEY.sub("...", short_reason(error)))
        raise invalid(
            f"where {where!r:.200} fails: {why}; the columns: {', '.join(columns)}"
        ) from None


def short_reason(error: BaseException) -> str:
    """The first line of LanceDB's error, without the paths of its source."""
    return re.sub(r"(, /\S+\.rs.*| \(code=.*)$", "", reason(error))[:300].removeprefix(
        "Invalid input, "
    )


def _hit(row: dict[str, Any], score: float) -> Hit:
    thumbnail = row.pop(THUMBNAIL, None) or b""
    return Hit(row["path"], score, {name: plain(value) for name, value in row.items()}, thumbnail)
