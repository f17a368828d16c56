"""The task `retrieve`, without Triton: texts and images in, the images of an index that are nearest
to them out.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    INDEX_MISMATCH,
    INDEX_REPLACED,
    Cancelled,
    TaskError,
    check_cancelled,
    invalid,
    redact,
)
from radapter_serve.files import as_text
from radapter_serve.index.facts import build_command, mismatch
from radapter_serve.index.index import Index, link_of
from radapter_serve.index.opened import OpenIndexes
from radapter_serve.release.release import Release
from radapter_serve.tasks.query import Query, combine
from radapter_serve.tasks.scores import fitted_min_score

DEFAULT_TOP_K = 10

# A text (UTF-8) or an encoded image, with α where that is an input, to its embedding, float32 [D];
# with `cancelled` where the request has it.
Embed = Callable[..., NDArray[np.float32]]


@dataclass
class RetrieveRequest:
    """One request of `retrieve`.

    Args:
        index: name of the index.
        query: what to search for.
        top_k: number of images to give back, or None for 10.
        where: a condition in SQL on the metadata's columns, or None.
        thumbnails: whether they are asked for.
        offset: number of images to leave out before the first, of a search by pages; None for no
            pages.
        index_version: the index's, as an answer named it; None for whichever there is.
        min_score: cosine in [-1, 1] from which images are given back, or None.
        calibrated: whether it is the one that the release was fitted to; for one text.
        cancelled: whether the caller has given up; None where that is unknown.
    """

    index: bytes
    query: Query = field(default_factory=Query)
    top_k: int | None = None
    where: bytes | None = None
    thumbnails: bool = False
    offset: int | None = None
    index_version: bytes | None = None
    min_score: float | None = None
    calibrated: bool = False
    cancelled: Cancelled | None = None


@dataclass(frozen=True)
class Embedder:
    """What embeds queries.

    Args:
        release: its facts.
        text: by the server's `embed_text`.
        image: by the server's `embed_image`.
    """

    release: Release
    text: Embed
    image: Embed


@dataclass
class Retrieved:
    """The answer, best first.

    Args:
        ids: object [k] of str.
        scores: float32 [k], cosines.
        metadata: object [k] of str, JSON.
        thumbnails: object [k] of bytes, JPEG; None where they were not asked for.
        index_version: of the index that was searched.
    """

    ids: NDArray[np.object_]
    scores: NDArray[np.float32]
    metadata: NDArray[np.object_]
    thumbnails: NDArray[np.object_] | None
    index_version: str


class Retrieve:
    """Retrieval from the indexes of a folder.

    Args:
        release: its facts.
        indexes: folder of index folders.
        embed_text: by the server's `embed_text`.
        embed_image: by the server's `embed_image`.
        others: other releases that the server embeds queries by; asked where an index is not of
            this one.
        origin: where the release is, as `radapter-index build --model-repository` takes it.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        release: Release,
        indexes: Path,
        embed_text: Embed,
        embed_image: Embed,
        others: Callable[[], Iterable[Embedder]] = tuple,
        origin: str = "model_repository",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = Embedder(release, embed_text, embed_image)
        self._others = others
        self._origin = origin
        self._indexes = OpenIndexes(indexes, clock)
        self._indexes.open_all()
        self._told: set[str] = set()  # generations for which the log has the command

    def __call__(self, request: RetrieveRequest) -> Retrieved:
        """Search.

        Raises:
            TaskError: no such index, one of another release or another version, a value that is
                not allowed, or an embedding that failed.
        """
        weights = request.query.checked_weights()
        index = self._indexes.get(_text(request.index, "index"))
        embedder = self._embedder(index)
        _check_version(index, request.index_version)
        where = None if request.where is None else _text(request.where, "where")
        min_score = _min_score(request, index, embedder)
        hits = index.search(
            combine(self._vectors(request, index, embedder), weights),
            DEFAULT_TOP_K if request.top_k is None else request.top_k,
            where,
            thumbnails=request.thumbnails,
            offset=request.offset,
            min_score=min_score,
        )
        return Retrieved(
            _objects([hit.id for hit in hits]),
            np.array([hit.score for hit in hits], np.float32),
            _objects([json.dumps(hit.metadata, ensure_ascii=False) for hit in hits]),
            _objects([hit.thumbnail for hit in hits]) if request.thumbnails else None,
            index.generation,
        )

    def _vectors(
        self, request: RetrieveRequest, index: Index, embedder: Embedder
    ) -> list[NDArray[np.float32]]:
        """The embedding of each part of a query."""
        query = request.query
        stored = index.embeddings([_text(id, "id") for id in query.ids]) if query.ids else ()
        alpha = embedder.release.request_alpha(index.facts.plan.release.alpha, 1)
        extra = [] if alpha is None else [alpha]
        told = {} if request.cancelled is None else {"cancelled": request.cancelled}
        vectors = []
        for embed, values in ((embedder.text, query.texts), (embedder.image, query.images)):
            for value in values:
                check_cancelled(request.cancelled)
                vectors.append(embed(value, *extra, **told))
        return [*vectors, *stored]

    def index(self, name: str) -> Index:
        """The index of that name as it is now.

        Raises:
            TaskError: no such index, one that can't be read, or one of another release.
        """
        index = self._indexes.get(name)
        self._embedder(index)
        return index

    def _embedder(self, index: Index) -> Embedder:
        """What made an index.

        Raises:
            TaskError: a release that the server does not have.
        """
        made = index.facts.plan.release
        for embedder in itertools.chain([self._own], self._others()):
            if made.is_of(embedder.release):
                return embedder
        name = as_text(index.folder.name)
        why = mismatch(made, self._own.release)
        if index.generation not in self._told:
            self._told.add(index.generation)
            print(f"the index {name!r} {why}; {self._again(index)}", file=sys.stderr)
        raise TaskError(
            INDEX_MISMATCH,
            f"the index {name!r} {redact(why)}; the server's log has the command that builds it"
            " again",
        )

    def _again(self, index: Index) -> str:
        """How this release makes an index again."""
        if link := link_of(index.folder):
            return f"build the index that was published to {link} again, and publish that"
        origin = {"model_repository": self._origin}
        command = build_command(
            index.folder.absolute(), index.facts.plan, self._own.release, origin
        )
        return f"build it again: {command}"


def _min_score(request: RetrieveRequest, index: Index, embedder: Embedder) -> float | None:
    """The cosine from which images are given back.

    Raises:
        TaskError: none is calibrated for what the request asks.
    """
    if not request.calibrated:
        return request.min_score
    if request.min_score is not None:
        raise invalid("give min_score or calibrated, not both")
    if not request.query.is_one_text:
        raise invalid("calibrated is for a search by one text; give a number as min_score")
    return fitted_min_score(embedder.release, index.facts.plan.release.alpha)


def _check_version(index: Index, wanted: bytes | None) -> None:
    """Raise a `TaskError` where an index is no longer the one whose next page is asked for."""
    if wanted is not None and wanted != index.generation.encode():
        raise TaskError(
            INDEX_REPLACED,
            f"the index {as_text(index.folder.name)!r} has another version than the page before;"
            " search again from offset 0",
        )


def _text(value: bytes, what: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"{what} is not UTF-8 ({error})") from None


def _objects(values: Sequence[Any]) -> NDArray[np.object_]:
    array = np.empty(len(values), object)
    array[:] = values
    return array
