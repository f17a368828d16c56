"""Indexes in a running Qdrant: published as a whole, and opened read-only by any number of servers.

SQL conditions become Qdrant's filters if Qdrant answers them exactly, and are refused otherwise.

The alias COLLECTION names the current collection, whose metadata hold the index's facts; switching
the alias replaces the index. The API key comes only from the environment.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from sqlglot import exp

from radapter_serve.contract.errors import UNKNOWN_INDEX, Cancelled, TaskError, invalid, redact
from radapter_serve.contract.images import FifoLimit
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.files import lock, write_text
from radapter_serve.index.collection import Progress
from radapter_serve.index.conditions import parse_condition
from radapter_serve.index.facts import FACTS, Hit, Index, IndexFacts, Search, in_thread, wait_for
from radapter_serve.index.folder import (
    EXACT,
    GENERATION,
    THUMBNAIL,
    VECTOR,
    FolderIndex,
    plain,
    pointed,
    read_pointer,
    vectors_of,
)

LINK = "at"  # the only key in the index.json of a folder that links to a published index
KEYS = ("RADAPTER_QDRANT_API_KEY", "QDRANT_API_KEY")
FACTS_KEY = "radapter_index"  # key of the facts, as JSON, in the collection's metadata
TIMEOUT = 10  # seconds for a search
# Requests of this process that Qdrant answers at a time, and those that wait. One whose caller has
# given up ends within the time-out.
TURNS = FifoLimit(32, 128, "searches in Qdrant")
SCHEMAS = {"number": "float", "text": "keyword", "truth": "bool", "time": "datetime"}  # Qdrant's
_POINTS = 64  # in a request, as Qdrant accepts 32 MB
_TIMEOUT = 120  # seconds for a request with points, and to start indexing a column
_PORT = 6333
_PLACE = re.compile(
    r"qdrant(s?)://(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::([0-9]{1,5}))?/(\w[\w.-]{0,150})/?", re.ASCII
)

ALLOWED = (
    "an index in Qdrant takes a column compared with a value with = <> < <= > >= IN BETWEEN (texts"
    " with = <> IN), IS NULL, AND, OR, NOT and brackets"
)
# Arrow types of the columns that every index has.
BASE_COLUMNS = {"path": "string", "width": "int32", "height": "int32", "digest": "string"}
_KINDS = {  # Arrow types that Qdrant compares as SQL does
    "number": r"u?int(8|16|32|64)|halffloat|float|double",
    "text": r"(large_)?string",
    "truth": r"bool",
    "time": r"date32\[day\]|timestamp\[(s|ms|us)\]",
}
_BOUND = {exp.GT: "gt", exp.GTE: "gte", exp.LT: "lt", exp.LTE: "lte"}
_OPPOSITE = {"gt": "lte", "gte": "lt", "lt": "gte", "lte": "gt"}
_TURNED = {"gt": "lt", "gte": "lte", "lt": "gt", "lte": "gte"}  # 2020 < year is year > 2020
_EXACT = 2**53  # largest magnitude of exact whole numbers in floats, the type of Qdrant's ranges


class Qdrant:
    """The address of an index in a running Qdrant: `qdrant[s]://HOST:PORT/ALIAS`, s for TLS."""

    def __init__(self, url: str) -> None:
        match = _PLACE.fullmatch(url)
        if match is None or not 0 < int(match[3] or _PORT) < 65536:
            raise RAdapterError(
                f"{url.rpartition('@')[2]!r:.200} is not the address of an index; allowed:"
                " qdrant://HOST:PORT/COLLECTION (qdrants:// for TLS), and names of letters,"
                " digits, _, - and ."
            )
        self.url = url
        self.name = match[4]
        self._http = f"http{match[1]}://{match[2]}:{match[3] or _PORT}"

    def client(self, timeout: int = TIMEOUT) -> Any:
        """Connect, with the key from the environment; `timeout` is in seconds for a request."""
        check_installed("qdrant_client", "qdrant")
        key = next((value for name in KEYS if (value := os.environ.get(name))), None)
        return _connected(self._http, key, timeout)

    def current(self) -> tuple[str, IndexFacts]:
        """Read the name of the current collection, and the facts of its index."""
        with qdrant_errors(self.url):
            config = self.client().get_collection(self.name).config
        try:
            values = json.loads((config.metadata or {})[FACTS_KEY])
            generation = values.pop(GENERATION)
            facts = IndexFacts.from_json(json.dumps(values))
            if not is_collection_of(self.name, generation):
                raise ValueError(f"{GENERATION} is {generation!r:.100}")
            if "path" not in facts.columns:
                raise ValueError(f"columns are {facts.columns!r:.100}")
            size = config.params.vectors.size
            if size != facts.plan.release.embed_dim:
                raise ValueError(
                    f"its vectors have the width {size} instead of {facts.plan.release.embed_dim}"
                )
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else f"{error}"
            raise RAdapterError(
                f"{self.url} holds no index that can be read ({why:.200}); publish it again:"
                f" radapter-index publish INDEX {self.url}"
            ) from None
        return generation, facts


class QdrantIndex(Index):
    """An index in a collection of a running Qdrant, which `folder` links to."""

    def __init__(self, folder: Path, url: str) -> None:
        self._place = Qdrant(url)
        super().__init__(folder, *self._place.current())

    def _find(self, search: Search) -> list[Hit]:
        from qdrant_client import models  # imported here, as other indexes need no client

        types = BASE_COLUMNS | self.facts.plan.column_types
        types = {name: kind for name, kind in types.items() if name in self.facts.columns}
        met = None if search.where is None else to_filter(search.where, types)
        payload: Any = (
            True if search.thumbnails else models.PayloadSelectorExclude(exclude=[THUMBNAIL])
        )
        with self._search_errors():
            answer = self._asked(
                "query_points",
                search.cancelled,
                query=np.asarray(search.embedding, np.float32).tolist(),
                query_filter=met,
                search_params=models.SearchParams(
                    exact=len(self) <= EXACT, hnsw_ef=max(128, 2 * search.top_k)
                ),
                limit=search.top_k,
                with_payload=payload,
            )
            hits = []
            for point in answer.points:
                metadata = {name: point.payload[name] for name in self.facts.columns}
                image = point.payload.get(THUMBNAIL) if search.thumbnails else None
                thumbnail = base64.b64decode(image or "")
                hits.append(Hit(str(metadata["path"]), float(point.score), metadata, thumbnail))
            return hits

    def _embeddings(
        self, ids: list[str], cancelled: Cancelled | None
    ) -> dict[str, NDArray[np.float32]]:
        from qdrant_client import models

        any_of: Any = {"key": "path", "match": {"any": ids}}
        with self._search_errors():
            points, _ = self._asked(
                "scroll",
                cancelled,
                scroll_filter=models.Filter(must=[any_of]),
                limit=len(ids),
                with_payload=["path"],
                with_vectors=True,
            )
            vectors = [np.array(point.vector, np.float32) for point in points]
            wanted = (self.facts.plan.release.embed_dim,)
            if any(vector.shape != wanted for vector in vectors):
                raise ValueError("a vector of another width")
            return {str(p.payload["path"]): v for p, v in zip(points, vectors, strict=True)}

    def _asked(self, method: str, cancelled: Cancelled | None, **options: Any) -> Any:
        """Call a method of the client, which asks no `cancelled`, in a thread of its own."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(TURNS(cancelled))
            turn = stack.pop_all()  # is held until Qdrant has answered

            def call() -> Any:
                with turn:
                    return getattr(self._place.client(), method)(self.generation, **options)

            return wait_for(in_thread(call), cancelled)

    @contextlib.contextmanager
    def _search_errors(self) -> Iterator[None]:
        """Reword the error of a search for its caller, and log the reason."""
        try:
            with qdrant_errors(self._place.url):
                yield
        except TaskError:
            raise
        except RAdapterError as error:
            print(f"the index {self._place.name}: {error}", file=sys.stderr)
            why = redact(str(error).partition(" can't be used: ")[2]) or "it is gone from Qdrant"
            raise TaskError(
                UNKNOWN_INDEX, f"the index {self._place.name} can't be searched in Qdrant: {why}"
            ) from None


def link_of(folder: Path) -> str:
    """Address of the published index that a folder links to; "" if it links to none."""
    return pointed(folder, LINK)


def refuse_link(folder: Path) -> None:
    """Raise an error if a folder links to a published index."""
    if link_of(folder):
        raise RAdapterError(
            f"{folder} links to a published index, which is read-only; name the folder of the index"
            " that was published there"
        )


def publish(folder: Path, url: str, progress: Progress | None = None) -> bool:
    """Publish an index, replacing the one there atomically; False if it is there already."""
    from qdrant_client import models  # imported here, as other commands need no client

    place = Qdrant(url)
    refuse_link(folder)
    read_pointer(folder)  # raises if there is no index; `lock` would create the folder
    with lock(folder, "radapter-index"), qdrant_errors(url):
        index = FolderIndex(folder, complete=True)
        client = place.client(_TIMEOUT)

        # Find the current collection; the name may belong to something else.
        names = {alias.alias_name: alias.collection_name for alias in client.get_aliases().aliases}
        before = names.get(place.name)
        if before is None:
            foreign = client.collection_exists(place.name)
        else:
            foreign = not is_collection_of(place.name, before)
        if foreign:
            raise RAdapterError(
                f"{url} is a collection that radapter-index did not make; give another name, or"
                " delete it there"
            )
        fresh = f"{place.name}-{index.generation}"
        if before == fresh and client.count(fresh, exact=True).count == len(index):
            return False

        _fill(client, fresh, index, progress)
        count = client.count(fresh, exact=True).count
        if count != len(index):
            raise RAdapterError(
                f"{url} has {count:,} of {len(index):,} images after all were put there;"
                " publish again"
            )

        # Switch the alias, and delete all collections but the new one and the one before.
        create = models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=fresh, alias_name=place.name)
        )
        delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=place.name))
        client.update_collection_aliases([create] if before is None else [delete, create])
        for collection in client.get_collections().collections:
            name = collection.name
            if is_collection_of(place.name, name) and name not in (before, fresh):
                client.delete_collection(name)
    return True


def _fill(client: Any, name: str, index: FolderIndex, progress: Progress | None) -> None:
    """Put the facts and the rows of an index into a new collection."""
    from qdrant_client import models

    if client.collection_exists(name):  # left by a stopped publication
        client.delete_collection(name)
    facts = dataclasses.replace(index.facts, nearest=None, files={})
    client.create_collection(
        name,
        vectors_config=models.VectorParams(
            size=facts.plan.release.embed_dim, distance=models.Distance.DOT, on_disk=True
        ),
        on_disk_payload=True,
        metadata={FACTS_KEY: json.dumps({**dataclasses.asdict(facts), GENERATION: name})},
    )
    for column, arrow in (BASE_COLUMNS | facts.plan.column_types).items():
        kind = kind_of(arrow)
        if kind is not None:
            schema: Any = SCHEMAS[kind]
            client.create_payload_index(name, key_of(column), field_schema=schema, wait=True)

    done = 0
    for batch in points_of(index):
        client.upsert(name, models.Batch(**batch), wait=True)
        done += len(batch["ids"])
        if progress is not None:
            progress(done, len(index))


def points_of(index: FolderIndex) -> Iterator[dict[str, Any]]:
    """Convert the rows to Qdrant's points in batches, with row numbers as ids."""
    columns = [*index.facts.columns, THUMBNAIL]
    start = 0
    for batch in index.rows([*columns, VECTOR], _POINTS):
        payloads = []
        for row in batch.select(columns).to_pylist():
            thumbnail = base64.b64encode(row.pop(THUMBNAIL) or b"").decode()
            payload = {name: plain(value) for name, value in row.items()}
            payloads.append({**payload, THUMBNAIL: thumbnail})
        yield {
            "ids": list(range(start, start + len(batch))),
            "vectors": vectors_of(batch[VECTOR]).tolist(),
            "payloads": payloads,
        }
        start += len(batch)


def link(url: str, out: Path) -> None:
    """Write a folder that links to a published index, for a server to serve."""
    Qdrant(url).current()
    if out.exists() and not link_of(out):
        raise RAdapterError(
            f"{out} already exists and is not a link to a published index; give another folder with"
            " --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / FACTS, json.dumps({LINK: url}))


def is_collection_of(name: str, collection: str) -> bool:
    """True if a collection was made by publishing the index `name`."""
    return re.fullmatch(re.escape(name) + "-g-[0-9a-f]{16}", collection) is not None


@contextlib.contextmanager
def qdrant_errors(url: str) -> Iterator[None]:
    """Reword an error of Qdrant's, without quoting its answer."""
    try:
        yield
    except RAdapterError:
        raise
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status == 404:
            raise RAdapterError(
                f"no index at {url}; put one there: radapter-index publish INDEX {url}"
            ) from None
        source = getattr(error, "source", error)  # the error that qdrant-client wraps
        why = f"its answer makes no sense ({type(source).__name__})"
        if isinstance(status, int):
            why = f"it answers HTTP {status}" + (f"; see {KEYS[0]}" if status in (401, 403) else "")
        elif type(source).__module__.split(".")[0] == "httpx":
            text = " ".join(str(source).split())[:120]
            text = f": {text}" if text.isprintable() and text else ""
            why = f"it does not answer as it should ({type(source).__name__}{text})"
        raise RAdapterError(f"{url} can't be used: {why}") from None


@lru_cache(8)  # a client keeps its connections
def _connected(url: str, key: str | None, timeout: int) -> Any:
    from qdrant_client import QdrantClient

    headers = {"api-key": key} if key else {}
    return QdrantClient(
        url=url, headers=headers, timeout=timeout, check_compatibility=False, trust_env=False
    )


def key_of(column: str) -> str:
    """Qdrant's name of a column, in quotes unless it has only letters, digits, _ and -."""
    return column if re.fullmatch(r"[A-Za-z0-9_-]+", column) else f'"{column}"'


def kind_of(arrow: str) -> str | None:
    """Kind of a column's values; None if Qdrant cannot compare them, or does so unlike SQL."""
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, arrow)), None)


def to_filter(where: str, types: Mapping[str, str]) -> Any:
    """Translate a condition on columns of these Arrow types into a filter of qdrant-client's."""
    from qdrant_client import models

    return models.Filter(**_filter(parse_condition(where), types, True))


def _filter(node: Any, types: Mapping[str, str], positive: bool) -> dict[str, Any]:
    """Build a filter that holds if a condition is true, or, if not `positive`, false. NOT moves
    inwards to the comparisons; a missing value meets neither these nor their negations.
    """
    node = node.unnest()
    match node:
        case exp.Not():
            return _filter(node.this, types, not positive)
        case exp.And() | exp.Or():
            parts = [_filter(part, types, positive) for part in node.flatten()]
            both = isinstance(node, exp.And) == positive
            return {"must" if both else "should": parts}
        case exp.Between():
            low = exp.GTE(this=node.this, expression=node.args["low"])
            high = exp.LTE(this=node.this, expression=node.args["high"])
            return _filter(exp.And(this=low, expression=high), types, positive)
        case exp.Is(expression=exp.Null()):
            column, _ = _column(node.this, types)
            return {"must" if positive else "must_not": [_is_null(column)]}
        case exp.In() if node.expressions:
            return _equal(node.this, node.expressions, types, positive)
        case exp.EQ() | exp.NEQ():
            left, right = _column_first(node)
            return _equal(left, [right], types, isinstance(node, exp.EQ) == positive)
        case exp.Column():
            return _equal(node, [exp.true()], types, positive)
    if type(node) not in _BOUND:
        _refuse(node)
    left, right = _column_first(node)
    bound = _BOUND[type(node)]
    if left is not node.this.unnest():
        bound = _TURNED[bound]
    column, kind = _column(left, types)
    if kind not in ("number", "time"):
        _refuse(node)
    value = _value(right, column, kind, types)
    span = {bound if positive else _OPPOSITE[bound]: value}
    return {"must": [{"key": key_of(column), "range": span}]}


def _equal(left: Any, right: list[Any], types: Mapping[str, str], positive: bool) -> dict[str, Any]:
    """Filter for a column that equals one of some values, or, if not `positive`, none of them."""
    column, kind = _column(left, types)
    key = key_of(column)
    values = [_value(node, column, kind, types) for node in right]
    met: list[Any]
    if kind == "text":
        met = [{"key": key, "match": {"any": values}}]
    elif kind == "truth":
        met = [{"key": key, "match": {"value": value}} for value in values]
    else:
        met = [{"key": key, "range": {"gte": value, "lte": value}} for value in values]
    return {"should": met} if positive else {"must_not": [*met, _is_null(column)]}


def _column_first(node: Any) -> tuple[Any, Any]:
    left = node.this.unnest()
    right = node.expression.unnest()
    if not isinstance(left, exp.Column):
        left, right = right, left
    if not isinstance(left, exp.Column):
        _refuse(node)
    return left, right


def _column(node: Any, types: Mapping[str, str]) -> tuple[str, str]:
    """Find a column's name and kind."""
    node = node.unnest()
    if not isinstance(node, exp.Column):
        _refuse(node)
    if node.name not in types:
        raise invalid(f"where names {node.name!r:.80}; the columns: {', '.join(types)}")
    kind = kind_of(types[node.name])
    if kind is None:
        raise invalid(f"where names {node.name!r:.80}, which is {types[node.name]}; {ALLOWED}")
    return node.name, kind


def _value(node: Any, column: str, kind: str, types: Mapping[str, str]) -> Any:
    """Read the literal that a column of a kind is compared with."""
    literal = node.unnest()
    sign = 1
    if kind == "number" and isinstance(literal, exp.Neg):
        literal = literal.this.unnest()
        sign = -1
    elif kind == "time" and isinstance(literal, exp.Cast) and literal.is_type("date", "timestamp"):
        literal = literal.this.unnest()
    value: Any = None
    match literal:
        case exp.Boolean() if kind == "truth":
            value = bool(literal.this)
        case exp.Literal(is_string=False) if kind == "number":
            number = sign * float(literal.this)
            if math.isfinite(number) and abs(number) < _EXACT:
                value = number
        case exp.Literal(is_string=True) if kind == "text":
            value = literal.this
        case exp.Literal(is_string=True) if kind == "time":
            with contextlib.suppress(ValueError):
                time = datetime.datetime.fromisoformat(literal.this)
                if not time.tzinfo:  # UTC, as everywhere in conditions
                    value = time.replace(tzinfo=datetime.timezone.utc)
    if value is None:
        raise invalid(
            f"where compares {column!r:.80}, a {kind}, with {node.unnest().sql()!r:.100}; {ALLOWED}"
        )
    narrow: Any = {"float": np.float32, "halffloat": np.float16}.get(types[column])
    return float(narrow(value)) if narrow else value


def _is_null(column: str) -> dict[str, Any]:
    return {"is_null": {"key": key_of(column)}}


def _refuse(node: Any) -> NoReturn:
    raise invalid(f"where has {node.sql()!r:.100}; {ALLOWED}")
