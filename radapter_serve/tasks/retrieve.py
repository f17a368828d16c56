"""The task `retrieve`, without Triton: a text or an image in, the images of an index that are nearest to it out."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_name, as_text
from radapter_serve.index.bucket import LINK
from radapter_serve.index.index import FACTS, Hit, Index, build_command, mismatch
from radapter_serve.index.opening import open_index
from radapter_serve.inputs.errors import INDEX_MISMATCH, UNKNOWN_INDEX, TaskError, invalid, public
from radapter_serve.inputs.names import is_name, spellings, there_are
from radapter_serve.release.release import Release

DEFAULT_TOP_K = 10
_AGAIN = 10.0  # seconds after which an index that could not be opened is tried again
_GAP = 0.05  # seconds after which an index that was there is looked for again: some disks can't exchange folders
_TRIES = 10  # of an index that is replaced again and again

# A text (UTF-8) or an encoded image, with α where that is an input, to its embedding, float32 [D].
Embed = Callable[..., NDArray[np.float32]]


@dataclass
class RetrieveRequest:
    """One request of `retrieve`.

    Args:
        index: name of the index.
        text: UTF-8; either this or `image`.
        image: encoded image.
        top_k: number of images to give back, or None for 10.
        where: a condition in SQL on the metadata's columns, or None.
        thumbnails: whether they are asked for.
    """

    index: bytes
    text: bytes | None = None
    image: bytes | None = None
    top_k: int | None = None
    where: bytes | None = None
    thumbnails: bool = False


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

    def made(self, index: Index) -> bool:
        """Whether the embeddings of an index are of this release."""
        release = self.release
        if release.dynamic_alpha:
            release = replace(release, alpha=index.facts["release"]["alpha"])
        return bool(index.facts["release_digest"] == release.digest)


@dataclass
class Retrieved:
    """The answer, best first.

    Args:
        ids: object [k] of str.
        scores: float32 [k], cosines.
        metadata: object [k] of str, JSON.
        thumbnails: object [k] of bytes, JPEG; None where they were not asked for.
    """

    ids: NDArray[np.object_]
    scores: NDArray[np.float32]
    metadata: NDArray[np.object_]
    thumbnails: NDArray[np.object_] | None


class Retrieve:
    """Retrieval from the indexes of a folder.

    Args:
        release: its facts.
        indexes: folder of index folders; one that appears there is found, one that is replaced is opened again.
        embed_text: by the server's `embed_text`.
        embed_image: by the server's `embed_image`.
        others: other releases that the server embeds queries by; asked where an index is not of this one.
        origin: where the release is, as `radapter-index build --model-repository` takes it.
    """

    def __init__(
        self,
        release: Release,
        indexes: Path,
        embed_text: Embed,
        embed_image: Embed,
        others: Callable[[], Iterable[Embedder]] = tuple,
        origin: str = "model_repository",
    ) -> None:
        self._own, self._folder, self._others = Embedder(release, embed_text, embed_image), indexes, others
        self._origin = origin
        self._told: set[str] = set()
        self._open: dict[str, tuple[tuple[int, int, int], Index]] = {}
        self._refused: dict[str, tuple[tuple[int, int, int], float]] = {}
        self._lock, self._locks = threading.Lock(), dict[str, threading.Lock]()
        if any(indexes.glob(f"*/{FACTS}")):  # LanceDB takes seconds to load, for which the first caller should not wait
            with contextlib.suppress(ImportError):  # a search says what is missing
                importlib.import_module("lancedb")

    def __call__(self, request: RetrieveRequest) -> Retrieved:
        """Search.

        Raises:
            TaskError: no such index, one of another release, a bad condition or top_k, neither text nor image, or an
                embedding that failed.
        """
        if (request.text is None) == (request.image is None):
            raise invalid("give text or image, one of them")
        name = _text(request.index, "index")
        index = self.index(name)
        for left in reversed(range(_TRIES)):
            try:
                hits = self._search(index, request)
                break
            except TaskError:
                before, index = index, self.index(name)
                if index is before or not left:
                    raise  # else it was replaced meanwhile
        return Retrieved(
            _objects([hit.id for hit in hits]),
            np.array([hit.score for hit in hits], np.float32),
            _objects([json.dumps(hit.metadata, ensure_ascii=False) for hit in hits]),
            _objects([hit.thumbnail for hit in hits]) if request.thumbnails else None,
        )

    def _search(self, index: Index, request: RetrieveRequest) -> list[Hit]:
        embedder = self._embedder(index)
        where = None if request.where is None else _text(request.where, "where")
        top_k = DEFAULT_TOP_K if request.top_k is None else request.top_k
        alpha = embedder.release.request_alpha(index.facts["release"]["alpha"], 1)
        extra = [] if alpha is None else [alpha]
        if request.text is not None:
            embedding = embedder.text(request.text, *extra)
        else:
            embedding = embedder.image(request.image or b"", *extra)
        return index.search(embedding, top_k, where, thumbnails=request.thumbnails)

    def index(self, name: str) -> Index:
        """The index of that name as it is now, opened once for as long as it doesn't change.

        Raises:
            TaskError: no such index, one that can't be read, or one of another release.
        """
        if not is_name(name):
            raise TaskError(UNKNOWN_INDEX, f"{name!r:.80} is no name of an index{self._known()}")
        found = self._find(name)
        if found is None and name in self._open:
            time.sleep(_GAP)
            found = self._find(name)
        if found is None:
            self._open.pop(name, None)
            raise TaskError(UNKNOWN_INDEX, f"no index {name!r:.80}{self._known()}")
        with self._lock:
            own = self._locks.setdefault(name, threading.Lock())
        with own:  # opening a big index takes seconds, for which requests to others should not wait
            index = self._opened(name, *found)
        self._embedder(index)
        return index

    def _find(self, name: str) -> tuple[Path, tuple[int, int, int]] | None:
        """The folder of an index, and what changes when it is replaced; None where there is none."""
        places = (self._folder / as_name(one) for one in spellings(name))
        return next(((place, key) for place in places if (key := _key(place)) is not None), None)

    def _opened(self, name: str, folder: Path, key: tuple[int, int, int]) -> Index:
        key = _key(folder) or key  # somebody else may have opened a newer one meanwhile
        known, index = self._open.get(name, (None, None))
        if index is not None and known == key and not index.outdated():
            return index
        refused, at = self._refused.get(name, (None, 0.0))
        if refused != key or time.monotonic() - at > _AGAIN:  # reading a big one that is broken takes seconds, too
            for _ in range(_TRIES):
                before, why = key, None
                try:
                    opened = open_index(folder)
                except RAdapterError as error:
                    why = error
                    time.sleep(_GAP)
                key = _key(folder) or key
                if key == before:
                    break  # else it was replaced while it was opened, and may be a part of both
            if why is None:
                self._told.discard(name)
                self._open[name] = before, opened
                return opened
            print(why, file=sys.stderr)
            self._refused[name] = before, time.monotonic()
        if index is not None and known == key:
            return index  # what it links to was replaced by something that can't be opened
        raise TaskError(UNKNOWN_INDEX, f"the index {name!r} can't be opened; the server's log says why")

    def _embedder(self, index: Index) -> Embedder:
        """What made an index.

        Raises:
            TaskError: a release that the server does not have.
        """
        for embedder in itertools.chain([self._own], self._others()):
            if embedder.made(index):
                return embedder
        name = as_text(index.folder.name)
        why = mismatch(index.facts, self._own.release)
        if name not in self._told:
            self._told.add(name)
            print(f"the index {name!r} {why}; {self._again(index)}", file=sys.stderr)
        raise TaskError(
            INDEX_MISMATCH, f"the index {name!r} {public(why)}; the server's log has the command that builds it again"
        )

    def _again(self, index: Index) -> str:
        """The command by which this release, or where it is published from, makes an index again."""
        if link := index.facts.get(LINK):
            return f"build the index that was published to {link} again, and publish that"
        origin = {"model_repository": self._origin}
        return f"build it again: {build_command(index.folder.absolute(), index.facts, self._own.release, origin)}"

    def _known(self) -> str:
        names = sorted(as_text(path.parent.name) for path in self._folder.glob(f"*/{FACTS}"))
        return there_are((name for name in names if name[0] != "."), "radapter-index build makes them")


def _key(folder: Path) -> tuple[int, int, int] | None:
    """What changes when an index is replaced or added to; None where there is none."""
    with contextlib.suppress(OSError):
        state = (folder / FACTS).stat()
        return state.st_mtime_ns, state.st_ino, state.st_size
    return None


def _text(value: bytes, what: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"{what} is not UTF-8 ({error})") from None


def _objects(values: Sequence[Any]) -> NDArray[np.object_]:
    array = np.empty(len(values), object)
    array[:] = values
    return array
