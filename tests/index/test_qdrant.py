"""Indexes in Qdrant: published as a whole, searched with the same answers, whatever Qdrant says."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from radapter_serve.cli.index import main
from radapter_serve.contract.errors import (
    CANCELLED,
    INVALID_ARGUMENT,
    OVERLOADED,
    UNKNOWN_INDEX,
    TaskError,
)
from radapter_serve.contract.images import FifoLimit
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import add, build
from radapter_serve.index.facts import FACTS
from radapter_serve.index.folder import THUMBNAIL, FolderIndex
from radapter_serve.index.index import POLL, Indexes, open_index
from radapter_serve.index.qdrant import (
    BASE_COLUMNS,
    FACTS_KEY,
    KEYS,
    SCHEMAS,
    Qdrant,
    key_of,
    kind_of,
    link,
    points_of,
    publish,
    to_filter,
)
from radapter_serve.tasks.retrieve import Query, RetrieveRequest
from tests.helpers.fake_clock import FakeClock
from tests.helpers.projection import DIM, Searching, projecting
from tests.index.test_index import write

if TYPE_CHECKING:  # Qdrant's client takes a second to load, so tests load it as they need it
    from tests.helpers.fake_qdrant import FakeQdrant

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        find_spec("qdrant_client") is None, reason="pip install -e '.[integrations]'"
    ),
]
QUERY = np.eye(DIM, dtype=np.float32)[0]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeQdrant]:
    from tests.helpers.fake_qdrant import fake_qdrant

    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    with fake_qdrant() as fake:
        yield fake


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(8):
        write(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def put(store: FakeQdrant, source: str, tmp_path: Path) -> Path:
    """Build `index`, publish it, and link it; returns the folder of the link."""
    build(source, tmp_path / "index", projecting())
    publish(tmp_path / "index", f"{store.url}/photos")
    link(f"{store.url}/photos", tmp_path / "indexes" / "photos")
    return tmp_path / "indexes" / "photos"


@pytest.fixture
def linked(store: FakeQdrant, photos: Path, tmp_path: Path) -> Path:
    return put(store, str(photos), tmp_path)


def test_the_commands(
    store: FakeQdrant,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("radapter_serve.encoders.loaded.release_at", lambda *_: projecting())
    linked = tmp_path / "linked"
    url = f"{store.url}/photos"
    call = ["build", str(photos), "--out", str(tmp_path / "index")]
    assert main(call) == 0
    assert main(["publish", str(tmp_path / "index"), url]) == 0
    assert f"radapter-index link {url}" in capsys.readouterr().out
    assert main(["link", url, "--out", str(linked)]) == 0
    shutil.rmtree(tmp_path / "index")
    assert [path.name for path in linked.iterdir()] == [FACTS] and main(["info", str(linked)]) == 0
    assert len(open_index(linked).search(QUERY, 100)) == 8


def test_hits_and_embeddings_are_those_of_the_folder(
    linked: Path, store: FakeQdrant, tmp_path: Path
) -> None:
    local = open_index(tmp_path / "index")
    published = open_index(linked)
    for query in (QUERY, -local.embeddings(["5.png"])[0]):
        hits, expected = (index.search(query, 8, thumbnails=True) for index in (published, local))
        assert store.requests[-1][2]["params"]["exact"] is True
        assert [(hit.id, hit.metadata, hit.thumbnail) for hit in hits] == [
            (hit.id, hit.metadata, hit.thumbnail) for hit in expected
        ]
        scores, expected_scores = ([hit.score for hit in page] for page in (hits, expected))
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert hits[0].thumbnail.startswith(b"\xff\xd8") and len(published) == 8
    assert not any(hit.thumbnail for hit in published.search(QUERY, 5))
    ids = ["3.png", "5.png", "3.png"]
    np.testing.assert_allclose(published.embeddings(ids), local.embeddings(ids), atol=1e-6)
    with pytest.raises(TaskError, match="has no image 'no.png'"):
        published.embeddings(["no.png"])
    broken = {"points": [{"id": 1, "payload": {"path": "3.png"}, "vector": [1.0]}]}
    store.answer = lambda path, true: broken if "scroll" in path else true
    with pytest.raises(TaskError, match=r"\[unknown_index\].*can't be searched in Qdrant"):
        published.embeddings(["3.png"])


CONDITIONS = [
    "NOT year > 2000",
    "year >= 2000 AND NOT (year = 2003 OR flag)",
    "2002 <= year",
    "year BETWEEN 2001 AND 2003",
    "year NOT BETWEEN 2001 AND 2003",
    "year NOT IN (1999, 2003)",
    "year < -1 OR year = 2001",
    "year IS NULL",
    "year IS NOT NULL AND `my title` IS NULL",
    "`my title` = 'it''s' OR \"my title\" = ''",
    "`my title` <> 'b'",
    "NOT (`my title` IN ('b', 'it''s') OR year = 2000)",
    "NOT flag",
    "flag = false",
    "share = 0.1",
    "share < 0.1 OR share > 0.3",
    "NOT day < timestamp '2024-01-02 12:00:00'",
    "path IN ('photos/0.png', 'photos/3.png') AND width = 40",
    "NOT NOT NOT (flag OR year = 1)",
]


@pytest.fixture
def table(photos: Path, tmp_path: Path) -> str:
    """Rows with missing values in every column."""
    start = datetime.datetime(2024, 1, 1, 12)
    rows = {
        "image": [str(photos / f"{number}.png") for number in range(8)],
        "year": [1999, 2000, 2001, 2002, 2003, None, -2, 1],
        "my title": ["a", "b", "it's", "", None, None, "it's", "B"],
        "flag": [True, False, None, True, False, True, None, False],
        "tags": [["a"], [], None, ["b"], [], [], [], []],
    }
    table = pa.table(rows)
    table = table.append_column(
        "share", pa.array([0.1, 0.2, 0.3, None, 0.1, 0.5, 0.0, 0.4], pa.float32())
    )
    days = [None if number == 4 else start + datetime.timedelta(days=number) for number in range(8)]
    parquet.write_table(
        table.append_column("day", pa.array(days, pa.timestamp("us"))), tmp_path / "t.parquet"
    )
    return f"parquet:{tmp_path / 't.parquet'}"


def test_conditions_are_met_as_in_sql_or_refused(
    store: FakeQdrant, table: str, tmp_path: Path
) -> None:
    index = open_index(put(store, table, tmp_path))
    local = open_index(tmp_path / "index")
    for where in CONDITIONS:
        expected = {hit.id: hit.metadata for hit in local.search(QUERY, 100, where)}
        assert 0 < len(expected) < 8, where
        assert {hit.id: hit.metadata for hit in index.search(QUERY, 100, where)} == expected, where
    for where, message in (
        *((where, "an index in Qdrant takes a column") for where in REFUSED),
        *((f"year = {value}", "'year', a number, with") for value in ("'2000'", "NULL", 2**53 + 1)),
        ("path = 3", "'path', a text, with"),
        ("day > 'yesterday'", "'day', a time, with"),
        ("tags = 'a'", "'tags', which is list<"),
        *((f"{name} = 1", f"'{name}'; the columns: path") for name in ("nothing", "thumbnail")),
        ("year >", "cannot be read"),
    ):
        with pytest.raises(TaskError, match=message) as error:
            index.search(QUERY, 3, where)
        assert error.value.code == INVALID_ARGUMENT and "\n" not in str(error.value)


REFUSED = ("path LIKE 'a%'", "year + 1 > 2000", "path < 'b'", "1 = 1")


def test_a_server_switches_to_the_newest_publication(
    linked: Path, store: FakeQdrant, photos: Path, tmp_path: Path
) -> None:
    clock = FakeClock()
    request = RetrieveRequest("photos", Query(["a"]), top_k=100)
    search = Searching.of(projecting(linked.parent), clock.monotonic)

    def count() -> int:
        clock.now += POLL
        return len(search.ids(request))

    assert count() == 8 and not publish(tmp_path / "index", f"{store.url}/photos")
    for number in range(3):
        write(photos / f"new{number}.png", 90 + number)
        add(tmp_path / "index", projecting())
        assert count() == 8 + number  # not published yet
        assert publish(tmp_path / "index", f"{store.url}/photos") and count() == 9 + number
        assert len(store.local.get_collections().collections) == 2
    with pytest.raises(TaskError, match=r"\[index_mismatch\]"):
        Searching.of(projecting(linked.parent, alpha=0.1))(request)


def test_a_publication_that_dies_is_not_seen(
    linked: Path, store: FakeQdrant, photos: Path, tmp_path: Path
) -> None:
    write(photos / "new.png", 9)
    add(tmp_path / "index", projecting())
    store.answer = lambda path, result: b"{" if path.endswith("/points") else result
    with pytest.raises(RAdapterError, match="can't be used: its answer makes no sense"):
        publish(tmp_path / "index", f"{store.url}/photos")
    store.answer = lambda path, result: {"count": 3} if path.endswith("/count") else result
    with pytest.raises(RAdapterError, match="has 3 of 9 images"):
        publish(tmp_path / "index", f"{store.url}/photos")
    store.answer = None
    assert len(open_index(linked).search(QUERY, 100)) == 8
    assert publish(tmp_path / "index", f"{store.url}/photos")
    assert len(open_index(linked).search(QUERY, 100)) == 9


def test_the_key_comes_from_the_environment(
    store: FakeQdrant, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.key = "secret"
    with pytest.raises(RAdapterError, match="HTTP 401; see RADAPTER_QDRANT_API_KEY"):
        put(store, str(photos), tmp_path)
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    assert len(open_index(put(store, str(photos), tmp_path)).search(QUERY)) == 8
    monkeypatch.setenv("RADAPTER_QDRANT_API_KEY", "wrong")
    with pytest.raises(RAdapterError, match="HTTP 401"):
        open_index(tmp_path / "indexes" / "photos")
    files_and_requests = "".join(path.read_text() for path in tmp_path.rglob("index.json")) + repr(
        store.requests
    )
    assert "secret" not in files_and_requests and "wrong" not in files_and_requests


@pytest.mark.parametrize(
    "hit", [b"", b'{"result": null}', {"score": "x"}, {"payload": None}, {"payload": {}}]
)
def test_malformed_answers_are_refused(hit: Any, linked: Path, store: FakeQdrant) -> None:
    """Bytes are the whole answer; else the first hit is changed."""
    retrieve = Searching.of(projecting(linked.parent))
    request = RetrieveRequest("photos", Query(["a"]), top_k=8, thumbnails=True)

    def bent(path: str, result: Any) -> Any:
        if not path.endswith("/query"):
            return result
        if isinstance(hit, bytes):
            return hit
        result["points"][0] |= hit
        return result

    store.answer = bent
    with pytest.raises(TaskError, match="photos can't be searched in Qdrant: its ans") as error:
        retrieve(request)
    assert error.value.code == UNKNOWN_INDEX and store.url not in str(error.value)
    hit = {"score": 7.0}
    with pytest.raises(TaskError, match="the server's log says why"):
        retrieve(request)
    store.answer = None
    assert len(retrieve(request).hits) == 8


def test_malformed_facts_are_refused(linked: Path, store: FakeQdrant) -> None:
    generation, facts = Qdrant(f"{store.url}/photos").current()
    wider = dataclasses.replace(facts.plan.release, embed_dim=DIM + 1)
    values = {**dataclasses.asdict(facts), "generation": generation}
    changes: list[dict[str, Any]] = [
        {"columns": [3]},
        {"columns": ["width"]},
        {"generation": "elsewhere"},
        {"plan": dataclasses.asdict(dataclasses.replace(facts.plan, release=wider))},
    ]
    texts = [json.dumps({**values, **change}) for change in changes]
    metadata: list[Any] = [None]

    def answer(_: str, result: Any) -> Any:
        result["config"]["metadata"] = {FACTS_KEY: metadata[0]}
        return result

    store.answer = answer
    for text in (*texts, "", "[]", "[" * 50_000, None):
        metadata[0] = text
        with pytest.raises(RAdapterError, match="can't be used|no index that can be read"):
            open_index(linked)


def test_wrong_addresses_and_collections_are_refused(
    store: FakeQdrant, photos: Path, tmp_path: Path
) -> None:
    for place in ("//", "//h", "//h:1/../x", "//k:secret@h/x", "//h:0/x", "x"):
        with pytest.raises(RAdapterError, match="is not the address of an index") as error:
            link(f"qdrant:{place}", tmp_path / "linked")
        assert "secret" not in str(error.value)
    url = f"{store.url}/photos"
    with pytest.raises(RAdapterError, match="no index at .*radapter-index publish"):
        link(url, tmp_path / "linked")
    with pytest.raises(RAdapterError, match="no index at"):
        publish(tmp_path / "nothing", url)
    assert not (tmp_path / "nothing").exists()
    linked = put(store, str(photos), tmp_path)
    with pytest.raises(RAdapterError, match="read-only"):
        add(linked, projecting())
    assert main(["verify", str(linked)]) == 2
    store.local.create_collection("mine", {})
    with pytest.raises(RAdapterError, match="is a collection that radapter-index did not make"):
        publish(tmp_path / "index", f"{store.url}/mine")


def test_an_open_index_stays_open_while_qdrant_is_down(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An open index stays open, and the log has one line, however often it is asked for."""
    from tests.helpers.fake_qdrant import fake_qdrant

    clock = FakeClock()
    with fake_qdrant() as store:
        linked = put(store, str(photos), tmp_path)
        indexes = Indexes(projecting(linked.parent), clock=clock.monotonic)
    capsys.readouterr()
    for _ in range(3):
        clock.now += POLL
        assert len(indexes.get("photos")[0]) == 8
    assert capsys.readouterr().err.count("it does not answer as it should") == 1
    with pytest.raises(TaskError, match="in Qdrant: it does not answer as it should") as error:
        indexes.get("photos")[0].search(QUERY)
    assert error.value.code == UNKNOWN_INDEX


def test_a_caller_that_gives_up_does_not_wait_for_qdrant(
    store: FakeQdrant, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request keeps the place until Qdrant has answered."""
    index = open_index(put(store, str(photos), tmp_path))
    turns = FifoLimit(1, 0, "searches in Qdrant")
    monkeypatch.setattr("radapter_serve.index.qdrant.TURNS", turns)
    answers = threading.Event()

    def slow(path: str, result: Any) -> Any:
        assert answers.wait(20)
        return result

    store.answer = slow
    for code in (CANCELLED, OVERLOADED):
        polls = iter([False] * 2)
        with pytest.raises(TaskError) as error:
            index.search(QUERY, cancelled=partial(next, polls, True))
        assert error.value.code == code
    answers.set()
    while turns._queue:
        time.sleep(0.01)
    assert len(index.search(QUERY, cancelled=lambda: False)) == 8
    assert len(index.embeddings(["0.png"], lambda: False)) == 1


def native(condition: Any) -> Any:
    """A filter of the client's as one of the library's."""
    import qdrant_edge as edge
    from qdrant_client import models

    if isinstance(condition, models.Filter):
        parts: list[Any] = [
            [native(each) for each in group] if group else None
            for group in (condition.must, condition.should, condition.must_not)
        ]
        return edge.Filter(*parts)
    if isinstance(condition, models.IsNullCondition):
        return edge.IsNullCondition(condition.is_null.key)
    if isinstance(condition.match, models.MatchAny):
        return edge.FieldCondition(condition.key, match=edge.MatchAny(condition.match.any))
    kind = (
        edge.RangeDateTime if isinstance(condition.range, models.DatetimeRange) else edge.RangeFloat
    )
    return edge.FieldCondition(
        condition.key, range=kind(**condition.range.model_dump(mode="json", exclude_none=True))
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_qdrants_own_engine_meets_the_conditions(table: str, tmp_path: Path, indexed: bool) -> None:
    """The engine of Qdrant's server, which comes as a library, answers as an index in a folder."""
    edge = pytest.importorskip("qdrant_edge", reason="pip install -e '.[integrations]'")
    build(table, tmp_path / "index", projecting())
    local = FolderIndex(tmp_path / "index")
    types = BASE_COLUMNS | local.facts.plan.column_types
    vectors = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Dot)
    (tmp_path / "shard").mkdir()
    shard = edge.EdgeShard.create(str(tmp_path / "shard"), edge.EdgeConfig(vectors=vectors))
    for column in types if indexed else ():
        kind = kind_of(types[column])
        if kind is not None:
            schema = getattr(edge.PayloadSchemaType, SCHEMAS[kind].capitalize())
            shard.update(edge.UpdateOperation.create_field_index(key_of(column), schema))
    for batch in points_of(local):
        rows = zip(batch["ids"], batch["vectors"], batch["payloads"], strict=True)
        shard.update(edge.UpdateOperation.upsert_points([edge.Point(*row) for row in rows]))
    # The library takes true for 1 in a condition, which JSON does not.
    for where in [where for where in CONDITIONS if "flag" not in where]:
        request = edge.QueryRequest(
            limit=100,
            query=edge.Query.Nearest(QUERY.tolist()),
            filter=native(to_filter(where, types)),
            with_payload=edge.PayloadSelector.Exclude([THUMBNAIL]),
            params=edge.SearchParams(exact=True),
        )
        points = {dict(point.payload or {})["path"]: point for point in shard.query(request)}
        expected = {hit.id: hit for hit in local.search(QUERY, 100, where)}
        assert {id: point.payload for id, point in points.items()} == {
            id: hit.metadata for id, hit in expected.items()
        }
        np.testing.assert_allclose(
            [points[id].score for id in expected],
            [hit.score for hit in expected.values()],
            atol=1e-5,
        )
    shard.close()
