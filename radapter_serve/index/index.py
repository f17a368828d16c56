"""An index: a folder of embeddings with metadata that one release made, and that is searched by cosine.

The folder holds `index.json`, a LanceDB table and, of many images, what FAISS needs to find the nearest of them.
`index.json` names the version of the table that is searched: what a killed process added to the table is not seen until
`index.json` is replaced.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.files import as_text, ascii_path
from radapter_serve.index.bucket import GENERATION, LINK, SCHEME, link_of, storage_options
from radapter_serve.index.condition import check_condition
from radapter_serve.index.integrity import check_files
from radapter_serve.index.neighbours import Neighbours, neighbours_of
from radapter_serve.index.qdrant import Qdrant, place_of
from radapter_serve.inputs.errors import UNKNOWN_INDEX, TaskError, invalid, public
from radapter_serve.release.release import Release

FORMAT = 4
FACTS, TABLE = "index.json", "images"
#: of up to so many images a search compares every embedding; of more, FAISS names candidates
EXACT = 20_000
MAX_TOP_K = 1000
UNIT = 1e-3  # how far a length or a cosine may be from what it can be, by rounding
_ROUNDING = 1e-5  # of a cosine in float32
_POLL = 5.0  # seconds
_KEY = re.compile(rf"{SCHEME}\S+|\S*\bg-[0-9a-f]{{16}}\S*")  # of an object


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Args:
        id: its path from the index's root.
        score: cosine, in [-1, 1].
        metadata: all columns but embedding and thumbnail, ready for JSON.
        thumbnail: JPEG; empty where it was not asked for, or there is none.
    """

    id: str
    score: float
    metadata: dict[str, Any]
    thumbnail: bytes = b""


class Index:
    """An index as it is when it is opened; what is added later is not seen.

    Args:
        folder: of the index, made by `radapter-index build`.
        searched: False opens the table alone.
        complete: whether all files of the table are compared with their digests, however large.

    Raises:
        RAdapterError: there is no index, or a broken one.

    Attributes:
        facts: what `index.json` says.
        columns: the columns of the metadata, which a condition may name.
    """

    def __init__(self, folder: str | Path, *, searched: bool = True, complete: bool = False) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        self._place = place_of(self.facts[LINK]) if LINK in self.facts else None
        self._asked = time.monotonic()
        self._open(searched, complete)

    def _open(self, searched: bool, complete: bool) -> None:
        if isinstance(self._place, Qdrant):
            raise RAdapterError(
                f"{self.folder} stands for an index in Qdrant, which can only be searched and shown; give the index "
                "that was published"
            )
        self._bucket = self._place
        check_installed("lancedb", "server")
        import lancedb  # here: a server without indexes needs none

        with table_errors(self.folder, self.facts):
            if self._bucket is None:
                check_files(self.folder / f"{TABLE}.lance", self.facts["files"], complete=complete)
                database = lancedb.connect(ascii_path(self.folder))
            else:
                database = lancedb.connect(self._bucket.table(self.facts), storage_options=storage_options())
            self.table = database.open_table(TABLE)
            self.table.checkout(self.facts["search"]["table_version"])
            self.columns: list[str] = self.facts["columns"]
        self._neighbours = self._opened() if searched else None

    def __len__(self) -> int:
        return int(self.facts["count"])

    def _opened(self) -> Neighbours | None:
        search = self.facts["search"]
        if "files" not in search:
            return None
        shape = len(self), int(self.facts["release"]["embed_dim"])
        place = neighbours_of(self.folder, search["table_version"])
        if self._bucket is not None:
            fetched = self._bucket.fetch(self.facts, place)
            with contextlib.suppress(RAdapterError):
                return Neighbours(fetched, search, shape)
            return Neighbours(self._bucket.fetch(self.facts, place, anew=True), search, shape)
        try:
            return Neighbours(place, search, shape)
        except RAdapterError as error:
            mend = f"radapter-index add --out {shlex.quote(str(self.folder))}"
            raise RAdapterError(f"the index {self.folder} can't be searched: {error}; mend it: {mend}") from None

    def outdated(self) -> bool:
        """Whether a published index was replaced; asked every five seconds at most."""
        if self._place is None or time.monotonic() - self._asked < _POLL:
            return False
        try:
            return bool(self._place.facts()[GENERATION] != self.facts[GENERATION])
        except RAdapterError:  # who can't ask goes on with what there is
            return False
        finally:
            self._asked = time.monotonic()  # after the answer, which may take longer than that

    def search(
        self, embedding: NDArray[np.float32], top_k: int = 10, where: str | None = None, *, thumbnails: bool = False
    ) -> list[Hit]:
        """Find the nearest images, best first; images with equal scores come in the order of their ids.

        Args:
            embedding: float32 [D], unit length.
            top_k: how many images at most, 1 to 1000.
            where: a condition in SQL on the columns, such as "year > 2020 AND path LIKE 'cats/%'".
            thumbnails: whether the hits have their thumbnails.

        Raises:
            TaskError: `top_k` or the condition is not allowed.
        """
        check_top_k(top_k)
        condition = check_condition(where) if where and where.strip() else None
        columns = [*self.columns, *(["thumbnail"] if thumbnails else [])]
        name = as_text(self.folder.name)
        with _search_errors(name, where, self.columns):
            hits = [_hit(row, score) for row, score in self._found(embedding, top_k, condition, columns)]
        check_scores(name, hits)
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    @cached_property
    def _vectors(self) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """LanceDB's row ids [N] and the embeddings, float32 [N, D], in the order of the images' ids.

        They are read at the first exact search, for numpy compares several times as fast as LanceDB: at most EXACT of
        them (41 MB where D is 512) stay in memory until the index is replaced.

        Raises:
            RAdapterError: one has not unit length.
        """
        table = self.table.search().select(["path", "vector"]).with_row_id(True).to_arrow().sort_by("path")
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
        if self._neighbours is None:
            found = self._exact(embedding, top_k, met)
        else:
            found = self._approximate(self._neighbours, embedding, top_k, met)
        if len(found) > top_k:
            found = self._first(found, embedding, top_k)
        if len(found):
            rows = self._rows(found, [*columns, "vector"])
            scores = cosines(vectors_of(rows["vector"]), embedding)
            yield from zip(rows.drop_columns(["vector", "_rowid"]).to_pylist(), scores.tolist(), strict=True)

    def _met(self, condition: str) -> NDArray[np.uint64]:
        """The row ids that meet a condition."""
        found = self.table.search().where(condition).select(["_rowid"]).to_arrow()["_rowid"]
        return np.asarray(found.to_numpy(), np.uint64)

    def _rows(self, ids: NDArray[np.uint64], columns: list[str]) -> Any:
        """Rows of the table in Arrow's form, in any order."""
        return self.table.take_row_ids(ids.tolist()).select(columns).with_row_id().to_arrow()

    def _exact(self, embedding: NDArray[np.float32], top_k: int, met: NDArray[np.uint64] | None) -> NDArray[np.uint64]:
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
        self, near: Neighbours, embedding: NDArray[np.float32], top_k: int, met: NDArray[np.uint64] | None
    ) -> NDArray[np.uint64]:
        """Row ids of the best hits of candidates; where few rows meet the condition, each is compared."""
        effort = self.facts["search"]
        if met is None:
            best, _ = near.nearest(embedding, min(top_k, len(self)), effort["nprobes"], effort["candidates"])
            return near.rows_of(best)
        among = near.positions(met)
        if len(among) <= EXACT:
            best, _ = near.best(embedding, among, top_k)
        else:
            best, _ = near.nearest_of(embedding, top_k, effort["candidates"], among)
        return near.rows_of(best)

    def _first(self, found: NDArray[np.uint64], embedding: NDArray[np.float32], top_k: int) -> NDArray[np.uint64]:
        """The best of more rows than are asked for, by their cosines and then by the images' ids."""
        rows = self._rows(found, ["path", "vector"]).sort_by("path")
        scores = cosines(vectors_of(rows["vector"]), embedding)
        return np.asarray(rows["_rowid"].to_numpy()[np.argsort(-scores, kind="stable")[:top_k]], np.uint64)


def check_top_k(top_k: int) -> None:
    """Refuse a number of hits that is not allowed."""
    if not 1 <= top_k <= MAX_TOP_K:
        raise invalid(f"top_k is {top_k}; allowed are whole numbers from 1 to {MAX_TOP_K}")


def check_scores(name: str, hits: Sequence[Hit]) -> None:
    """Refuse hits whose scores no cosine has.

    Raises:
        TaskError: one is not a number from -1 to 1, but for rounding.
    """
    for hit in hits:
        if not abs(hit.score) <= 1 + UNIT:
            print(
                f"the index {name} gives {hit.id!r:.200} the score {hit.score:g}; see radapter-index verify",
                file=sys.stderr,
            )
            raise TaskError(
                UNKNOWN_INDEX, f"the index {name} can't be searched: a file is damaged; the server's log says why"
            )


def cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of each vector with a query, by sums that don't depend on its place, so that equals score the same.

    Args:
        vectors: float32 [N, D], unit length.
        query: float32 [D], unit length.
    """
    return np.asarray((vectors * query).sum(axis=1), np.float32)


def read_facts(folder: Path) -> dict[str, Any]:
    """`index.json` of an index, or of the published one that it links to.

    Raises:
        RAdapterError: there is none, or not one of this format.
    """
    path = folder / FACTS
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if LINK in facts:
            facts = {**place_of(str(facts[LINK])).facts(), LINK: str(facts[LINK])}
        if facts["format"] != FORMAT:
            raise RAdapterError(
                f"{folder} is an index of format {facts['format']}, and this version reads {FORMAT}; "
                f"{_again(folder, facts)}"
            )
    except (FileNotFoundError, NotADirectoryError):
        raise RAdapterError(
            f"no index at {folder}; make one: radapter-index build PHOTOS --out {shlex.quote(str(folder))}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RAdapterError(f"{path} can't be read ({error}); {_again(folder)}") from None
    return facts


def _again(folder: Path, facts: Mapping[str, Any] | None = None) -> str:
    """What mends an index that can't be read."""
    if link := link_of(folder):
        return f"publish it again: radapter-index publish INDEX {shlex.quote(link)}"
    return f"build it again: {build_command(folder, facts)} --no-resume"


def build_command(
    folder: Path,
    facts: Mapping[str, Any] | None = None,
    release: Release | None = None,
    origin: Mapping[str, str] | None = None,
) -> str:
    """The command that builds an index again, by the release that made it or by another.

    Args:
        folder: of the index.
        facts: of the index; None where they can't be read.
        release: the other release.
        origin: where that is, as of `EmbeddingRelease`.
    """
    if facts is None:
        return f"radapter-index build SOURCE --out {shlex.quote(str(folder))}"
    command = ["radapter-index", "build", facts["source"], "--out", str(folder)]
    for name, usual in (("image_column", "image"), ("thumbnails", 128)):
        if facts[name] != usual:
            command += [f"--{name.replace('_', '-')}", str(facts[name])]
    if not facts["exif_orientation"]:
        command.append("--no-exif-orientation")
    if facts["on_broken"] != "refuse":
        command += ["--on-broken", facts["on_broken"]]
    for name, place in (facts["origin"] if origin is None else origin).items():
        command += [f"--{name.replace('_', '-')}", place]
    if release.dynamic_alpha if release else facts["release"].get("dynamic_alpha"):
        command += ["--alpha", f"{facts['release']['alpha']:g}"]
    return shlex.join(command)


def mismatch(facts: Mapping[str, Any], release: Release) -> str:
    """Why an index can't be searched by a release that did not make it, as the end of a sentence about the index."""
    made, now = (
        f"{one['architecture']} at alpha {one['alpha']:g}, release {one['version']}"
        for one in (facts["release"], release.to_dict())
    )
    return f"is of another release ({made} then; this is {now}), so their embeddings can't be compared"


@contextlib.contextmanager
def table_errors(folder: Path, facts: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn LanceDB's errors, which have no common base, into one for people.

    Args:
        folder: of the index.
        facts: of the index, from which the command is that mends it.
    """
    try:
        yield
    except RAdapterError:
        raise
    except Exception as error:
        raise RAdapterError(f"the index {folder} can't be used: {_short(error)}; {_again(folder, facts)}") from error


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
        why = public(_KEY.sub("...", _short(error)))
        raise invalid(f"where {where!r:.200} fails: {why}; the columns: {', '.join(columns)}") from None


def _short(error: BaseException) -> str:
    """The first line of LanceDB's error, without the paths of its source."""
    return re.sub(r"(, /\S+\.rs.*| \(code=.*)$", "", reason(error))[:300].removeprefix("Invalid input, ")


def vectors_of(column: Any) -> NDArray[np.float32]:
    """An Arrow column of embeddings as float32 [N, D]."""
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(array), -1)


def _hit(row: dict[str, Any], score: float) -> Hit:
    thumbnail = row.pop("thumbnail", None) or b""
    return Hit(row["path"], score, {name: plain(value) for name, value in row.items()}, thumbnail)


def plain(value: Any) -> Any:
    """A value that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(one) for one in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
