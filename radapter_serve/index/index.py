"""An index: a folder of embeddings with metadata, made by one release, searched by cosine.

The folder holds `index.json` and a LanceDB table. What counts is what `index.json` says: it names the version of the
table that is searched, so whatever a killed process added to the table is not seen before `index.json` is replaced.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.inputs.errors import INVALID_ARGUMENT, UNKNOWN_INDEX, TaskError

FORMAT = 1
FACTS, TABLE = "index.json", "images"
#: up to here, every vector is compared; above, LanceDB's approximate index chooses which
EXACT = 100_000
MAX_TOP_K = 1000
MAX_CONDITION = 2000  # characters
MAX_OPERATORS = 300  # with names and brackets: the engine's stack overflows on deeper conditions, and ends the process
_FUNCTIONS = ("cast", "coalesce", "length", "lower", "upper")
_BEFORE_BRACKET = ("and", "or", "not", "in", *_FUNCTIONS)
_SQL = re.compile(
    r"""\s+ | (?P<text>'(?:[^']|'')*') | (?P<name>`[^`]+` | "[^"]+") | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    | (?P<word>[^\W\d]\w*) | (?P<open>\() | (?P<sign><=|>=|<>|!=|[=<>+\-*/%,)])""",
    re.VERBOSE,
)


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
    """An index that was built, as `index.json` describes it at this moment.

    Args:
        folder: made by `radapter-index build`.

    Raises:
        RAdapterError: no index there, or a broken one.

    Attributes:
        facts: `index.json`.
        columns: names of the metadata's columns, which a condition may use.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        try:
            import lancedb  # here: a server without indexes needs none
        except ModuleNotFoundError:
            raise RAdapterError("lancedb is not installed; pip install 'radapter-serve[server]'") from None
        with engine_errors(self.folder):
            self.table = lancedb.connect(self.folder).open_table(TABLE)
            self.table.checkout(self.facts["engine"]["table_version"])
            self.columns: list[str] = self.facts["columns"]

    def __len__(self) -> int:
        return int(self.facts["count"])

    def search(
        self, embedding: NDArray[np.float32], top_k: int = 10, where: str | None = None, *, thumbnails: bool = False
    ) -> list[Hit]:
        """The nearest images, best first; of equal ones, in the order of their ids.

        Args:
            embedding: float32 [D], unit length.
            top_k: how many at most, 1 to 1000.
            where: a condition in SQL on the columns, such as "year > 2020 AND path LIKE 'cats/%'".
            thumbnails: bring them along.

        Raises:
            TaskError: `top_k` or the condition is not allowed.
        """
        if not 1 <= top_k <= MAX_TOP_K:
            raise TaskError(INVALID_ARGUMENT, f"top_k is {top_k}; allowed are whole numbers from 1 to {MAX_TOP_K}")
        condition = check_condition(where) if where and where.strip() else None
        columns = [*self.columns, *(["thumbnail"] if thumbnails else [])]
        find = self._approximate if "index" in self.facts["engine"] else self._exact
        with _condition_errors(self.folder, where, self.columns):
            hits = [_hit(row, score) for row, score in find(embedding, top_k, condition, columns)]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    @cached_property
    def _vectors(self) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """The engine's row ids [N], ascending, and the embeddings, float32 [N, D].

        Read at the first exact search, for numpy compares several times as fast as the engine: at most EXACT of them
        (205 MB where D is 512) until the index is replaced.
        """
        table = self.table.search().select(["vector"]).with_row_id(True).to_arrow()
        ids = table["_rowid"].to_numpy()
        vectors = vectors_of(table["vector"])
        order = np.argsort(ids)
        return ids[order], vectors if (order[1:] > order[:-1]).all() else vectors[order]

    def _exact(
        self, embedding: NDArray[np.float32], top_k: int, condition: str | None, columns: list[str]
    ) -> Iterator[tuple[dict[str, Any], float]]:
        """Rows and scores, of all that meet the condition."""
        ids, vectors = self._vectors
        scores = vectors @ embedding
        if condition is not None:
            met = self.table.search().where(condition).select(["path"]).with_row_id(True).to_arrow()
            which = np.searchsorted(ids, met["_rowid"].to_numpy())
            ids, scores = ids[which], scores[which]
        best = np.argsort(-scores)[:top_k] if len(ids) <= top_k else np.argpartition(-scores, top_k)[:top_k]
        found = dict(zip(ids[best].tolist(), scores[best].tolist(), strict=True))
        if found:
            for row in self.table.take_row_ids(list(found)).select(columns).with_row_id().to_arrow().to_pylist():
                yield row, found[row.pop("_rowid")]

    def _approximate(
        self, embedding: NDArray[np.float32], top_k: int, condition: str | None, columns: list[str]
    ) -> Iterator[tuple[dict[str, Any], float]]:
        """The same by the engine's approximate index, but for conditions that leave few."""
        engine = self.facts["engine"]
        query: Any = self.table.search(np.asarray(embedding, np.float32))
        query = query.distance_type("dot").limit(top_k).select([*columns, "_distance"])
        if condition is not None:
            query = query.where(condition, prefilter=True)
        if condition is None or self.table.count_rows(condition) > EXACT:
            query = query.nprobes(engine["nprobes"]).refine_factor(engine["refine_factor"])
        else:
            query = query.bypass_vector_index()
        for row in query.to_arrow().to_pylist():
            yield row, 1.0 - row.pop("_distance")


def read_facts(folder: Path) -> dict[str, Any]:
    """`index.json` of an index.

    Raises:
        RAdapterError: there is none, or not one of this format.
    """
    path = folder / FACTS
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise RAdapterError(f"{folder} is an index of format {facts['format']}; this version reads {FORMAT}")
    except (FileNotFoundError, NotADirectoryError):
        raise RAdapterError(f"no index at {folder}; make one: radapter-index build PHOTOS --out {folder}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RAdapterError(f"{path} can't be read ({error}); build the index again: {rebuild(folder)}") from None
    return facts


def rebuild(folder: Path, facts: Mapping[str, Any] | None = None) -> str:
    """The command that builds an index again."""
    source = shlex.quote(facts["source"]) if facts else "SOURCE"
    return f"radapter-index build {source} --out {shlex.quote(str(folder))}"


def mismatch(folder: Path, facts: Mapping[str, Any], release: Mapping[str, Any]) -> str:
    """Why an index that another release made is refused, and the command that builds it again."""
    made, now = (
        f"{one['architecture']} at alpha {one['alpha']:g}, release {one['version']}"
        for one in (facts["release"], release)
    )
    at = f" --alpha {facts['release']['alpha']:g}" if release.get("dynamic_alpha") else ""
    return (
        f"the index {folder} is of another release ({made} then; this is {now}), so their embeddings can't be "
        f"compared; build it again: {rebuild(folder, facts)}{at}"
    )


def check_condition(where: str) -> str:
    """A condition that compares columns and nothing else: SQL that could do more is refused before it is run.

    Raises:
        TaskError: too long, or with something in it that no comparison needs.
    """
    if len(where) > MAX_CONDITION:
        raise TaskError(INVALID_ARGUMENT, f"where has {len(where)} characters; at most {MAX_CONDITION} are allowed")
    place, last, operators = 0, "", 0
    while place < len(where):
        found = _SQL.match(where, place)
        if found is None:
            raise TaskError(INVALID_ARGUMENT, f"where has {where[place]!r} at character {place + 1}; {_ALLOWED}")
        if found["open"] and re.search(r"[\w`\"']$", last) and last not in _BEFORE_BRACKET:
            raise TaskError(INVALID_ARGUMENT, f"where calls {last}(); functions: {', '.join(_FUNCTIONS)}")
        if not found[0].isspace():
            last = (found["word"] or found["name"] or found[0]).lower()
        if found["word"] and last in ("select", "from"):
            raise TaskError(INVALID_ARGUMENT, f"where has {found[0]!r}, and takes no query; {_ALLOWED}")
        operators += not (found[0].isspace() or found["text"] or found["number"] or found[0] == ",")
        place = found.end()
    if operators > MAX_OPERATORS:
        raise TaskError(
            INVALID_ARGUMENT,
            f"where has {operators} operators, names and brackets; at most {MAX_OPERATORS} are allowed: write a list "
            "as path IN ('a.jpg', 'b.jpg')",
        )
    return where


_ALLOWED = "allowed is a condition such as year > 2020 AND (path LIKE 'cats/%' OR `file name` = 'it''s')"


@contextlib.contextmanager
def engine_errors(folder: Path) -> Iterator[None]:
    """Errors of the engine, which have no common base, as one for people."""
    try:
        yield
    except RAdapterError:
        raise
    except Exception as error:
        raise RAdapterError(f"the index {folder} can't be used: {_short(error)}; see radapter-index verify") from error


@contextlib.contextmanager
def _condition_errors(folder: Path, where: str | None, columns: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the engine's is no Exception
        if where is None:
            raise TaskError(
                UNKNOWN_INDEX, f"the index {folder} can't be searched: {_short(error)}; see radapter-index verify"
            ) from error
        raise TaskError(
            INVALID_ARGUMENT, f"where {where!r:.200} fails: {_short(error)}; the columns: {', '.join(columns)}"
        ) from None


def _short(error: BaseException) -> str:
    """The engine's first line without its source paths."""
    return re.sub(r"(, /\S+\.rs.*| \(code=.*)$", "", reason(error))[:300].removeprefix("Invalid input, ")


def vectors_of(column: Any) -> NDArray[np.float32]:
    """An Arrow column of embeddings as float32 [N, D]."""
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(array), -1)


def _hit(row: dict[str, Any], score: float) -> Hit:
    thumbnail = row.pop("thumbnail", None) or b""
    return Hit(row["path"], score, {name: _plain(value) for name, value in row.items()}, thumbnail)


def _plain(value: Any) -> Any:
    """A value that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
