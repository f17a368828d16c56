"""Indexes on object storage: published as a whole, opened read-only, replaced while they are
searched.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from radapter_serve.cli.index import main
from radapter_serve.contract.errors import TaskError
from radapter_serve.errors import RAdapterError
from radapter_serve.index import stored
from radapter_serve.index.build import add, build
from radapter_serve.index.embeddings import export_embeddings
from radapter_serve.index.facts import FACTS, IndexFacts
from radapter_serve.index.index import open_index, read_facts
from radapter_serve.index.opened import POLL, OpenIndexes
from radapter_serve.index.publish import link, publish
from radapter_serve.index.store import s3 as storage
from radapter_serve.index.store.s3 import Bucket
from radapter_serve.index.verify import verify
from radapter_serve.tasks.query import Query
from radapter_serve.tasks.retrieve import RetrieveRequest
from tests.helpers.fake_clock import FakeClock
from tests.helpers.indexes import retrieving
from tests.helpers.small_disk import small_disk
from tests.index.test_index import DIM, FakeRelease, embeds_of, write
from tests.index.test_neighbours import SMALL, Ready, clustered, found, recall, write_numbers

URL = "s3://pictures/indexes/photos"
QUERY = np.eye(DIM, dtype=np.float32)[0]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Object storage in this process."""
    from moto.server import ThreadedMotoServer  # here: it takes long to load

    served = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    """Storage that refuses whatever is asked; where nobody listens, one asks for seconds."""

    class Refusing(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture
def client(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The environment of who may use it, with an empty bucket; boto3 looks into it."""
    import boto3  # here: it takes long to load

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "somebody"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ENDPOINT_URL", server),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        (storage.CACHE, str(tmp_path / "cache")),
    ):
        monkeypatch.setenv(name, value)
    one = boto3.client("s3", region_name="eu-west-1")
    one.create_bucket(
        Bucket="pictures", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    yield one
    keys = one.list_objects_v2(Bucket="pictures").get("Contents", [])
    for key in keys:
        one.delete_object(Bucket="pictures", Key=key["Key"])
    one.delete_bucket(Bucket="pictures")


def keys(client) -> list[str]:
    return [one["Key"] for one in client.list_objects_v2(Bucket="pictures").get("Contents", [])]


def generations(client) -> set[str]:
    return {part for key in keys(client) for part in key.split("/") if part.startswith("g-")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(5):
        write(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def test_published_linked_and_searched(client, photos: Path, tmp_path: Path) -> None:
    build(str(photos), tmp_path / "index", release := FakeRelease())
    assert main(["publish", str(tmp_path / "index"), URL]) == 0
    assert main(["link", URL, "--out", str(tmp_path / "linked")]) == 0
    shutil.rmtree(tmp_path / "index")
    index = open_index(tmp_path / "linked")
    embeds = embeds_of(release, sorted(photos.iterdir()))
    hits = index.search(embeds[3], 3, thumbnails=True)
    assert [hit.id for hit in hits] == [
        f"{number}.png" for number in np.argsort(-(embeds @ embeds[3]))[:3]
    ]
    assert hits[0].thumbnail.startswith(b"\xff\xd8") and hits[0].metadata["width"] == 40
    assert [hit.id for hit in index.search(embeds[3], 3, "path = '1.png'")] == ["1.png"]
    assert "somebody" not in index.facts.to_json() and main(["info", str(tmp_path / "linked")]) == 0


@pytest.mark.slow
def test_many_images_are_found_by_files_in_a_bounded_cache(
    client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = storage.copy
    vectors, texts = clustered(1200, 32, 30)
    release = Ready(vectors, texts[:100])
    out = tmp_path / "index"
    linked = tmp_path / "linked"
    for count in (1000, 1050, 1100, 1150):
        write_numbers(tmp_path / "photos", range(count))
        build(str(tmp_path / "photos"), out, release, sizes=SMALL)
        assert publish(out, URL) and not publish(out, URL)
        link(URL, linked)
        index = open_index(linked)
        assert len(index) == count and recall(index, vectors[1150:], vectors[:count]) >= 0.95
        (own,) = (tmp_path / "cache").iterdir()
        assert (
            len([path for path in own.iterdir() if path.is_dir()]) <= 2
            and len(generations(client)) <= 2
        )
    (codes,) = own.glob(f"{index.generation}/search/codes.faiss")
    codes.write_bytes(b"broken")
    os.utime(codes.parent, (0, 0))
    assert found(open_index(linked), vectors[5], 1) == [5]  # it was fetched again
    key = f"indexes/photos/{codes.relative_to(own).as_posix()}"
    assert key in keys(client)
    client.put_object(Bucket="pictures", Key=key, Body=b"broken")
    os.utime(codes.parent, (0, 0))
    codes.write_bytes(b"broken")
    fetched: list[str] = []

    def counted(source: str, target: str, *, down: bool) -> None:
        fetched.append(source)
        copy(source, target, down=down)

    monkeypatch.setattr(storage, "copy", counted)
    for _ in range(3):
        with pytest.raises(RAdapterError, match="is not as it was written; publish it again"):
            open_index(linked)
    assert len(fetched) == 1  # it is broken there, too


def test_a_server_goes_over_to_what_was_published_last(
    client, photos: Path, tmp_path: Path
) -> None:
    build(str(photos), tmp_path / "index", release := FakeRelease())
    publish(tmp_path / "index", URL)
    link(URL, tmp_path / "indexes" / "photos")
    clock = FakeClock()
    retrieve = retrieving(release, tmp_path / "indexes", QUERY, clock.monotonic)

    def count() -> int:
        clock.now += POLL
        return len(retrieve(RetrieveRequest("photos", Query(["a"]), top_k=100)).hits)

    assert count() == 5
    # An image of the index asks by its id, and pages are as in a folder.
    here = open_index(tmp_path / "index")
    linked = open_index(tmp_path / "indexes" / "photos")
    name = here.search(QUERY, 1)[0].id
    np.testing.assert_array_equal(linked.embeddings([name]), here.embeddings([name]))
    page = RetrieveRequest("photos", Query(ids=[name]), top_k=2, offset=1)
    following = retrieve(page)
    assert [hit.id for hit in following.hits] == [
        hit.id for hit in here.search(here.embeddings([name])[0], 2, offset=1)
    ]
    write(photos / "new.png", 9)
    add(tmp_path / "index", release)
    assert count() == 5  # not published yet
    publish(tmp_path / "index", URL)
    assert count() == 6
    with pytest.raises(TaskError, match=r"\[index_replaced\]"):
        retrieve(dataclasses.replace(page, index_version=following.index_version))
    client.delete_object(Bucket="pictures", Key="indexes/photos/index.json")
    assert count() == 6  # who can't ask goes on


def test_a_publication_that_dies_is_not_seen(
    client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(str(photos), tmp_path / "index", release := FakeRelease())
    publish(tmp_path / "index", URL)
    link(URL, tmp_path / "linked")
    write(photos / "new.png", 9)
    add(tmp_path / "index", release)

    copy = storage.copy

    def die(source: str, target: str, *, down: bool) -> None:
        copy(source, target, down=down)
        raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "copy", die)
        with pytest.raises(
            RAdapterError, match="can't be used: the network is gone; see AWS_ACCESS_KEY_ID"
        ):
            publish(tmp_path / "index", URL)
    assert len(open_index(tmp_path / "linked").search(QUERY, 100)) == 5
    publish(tmp_path / "index", URL)
    assert len(open_index(tmp_path / "linked").search(QUERY, 100)) == 6


def test_only_an_index_is_published(client, photos: Path, tmp_path: Path) -> None:
    build(str(photos), tmp_path / "index", FakeRelease())
    publish(tmp_path / "index", URL)
    link(URL, tmp_path / "linked")
    before = keys(client)
    with pytest.raises(
        RAdapterError, match="linked links to a published index; publish the index that"
    ):
        publish(tmp_path / "linked", URL)
    with pytest.raises(RAdapterError, match="no index at .*nowhere"):
        publish(tmp_path / "nowhere", URL)
    assert not (tmp_path / "nowhere").exists() and keys(client) == before
    assert len(open_index(tmp_path / "linked").search(QUERY, 100)) == 5


def test_the_generation_that_is_read_outlives_one_that_was_never_finished(
    client, photos: Path, tmp_path: Path
) -> None:
    build(str(photos), tmp_path / "index", release := FakeRelease())
    publish(tmp_path / "index", URL)
    link(URL, tmp_path / "linked")
    read = open_index(tmp_path / "linked")
    killed = "g-0123456789abcdef"
    client.put_object(
        Bucket="pictures",
        Key=f"indexes/photos/{killed}/images.lance/x",
        Body=b"newer than the other",
    )
    write(photos / "new.png", 9)
    add(tmp_path / "index", release)
    publish(tmp_path / "index", URL)
    assert len(read.search(QUERY, 100)) == 5
    assert generations(client) == {read.generation, open_index(tmp_path / "linked").generation}


def put_broken(client, facts: IndexFacts, name: str) -> None:
    """Publish a generation that can't be opened."""
    body = json.dumps({**dataclasses.asdict(facts), "generation": name})
    client.put_object(Bucket="pictures", Key="indexes/photos/index.json", Body=body.encode())


def test_what_is_open_goes_on_where_what_was_published_last_can_not_be_opened(
    client,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(str(photos), tmp_path / "index", release := FakeRelease())
    publish(tmp_path / "index", URL)
    link(URL, tmp_path / "indexes" / "photos")
    clock = FakeClock()
    retrieve = retrieving(release, tmp_path / "indexes", QUERY, clock.monotonic)
    request = RetrieveRequest("photos", Query(["a"]), top_k=100)
    assert len(retrieve(request).hits) == 5
    put_broken(client, read_facts(tmp_path / "index"), "g-0123456789abcdef")
    for _ in range(2):
        clock.now += POLL
        assert len(retrieve(request).hits) == 5
    log = capsys.readouterr().err
    assert "publish it again: radapter-index publish" in log and "radapter-index build" not in log
    publish(tmp_path / "index", URL)
    clock.now += POLL
    assert len(retrieve(request).hits) == 5


def test_a_storage_is_asked_again_five_seconds_after_its_answer(
    client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(str(photos), tmp_path / "index", FakeRelease())
    publish(tmp_path / "index", URL)
    link(URL, tmp_path / "linked")
    now = [0.0]
    asked: list[float] = []
    indexes = OpenIndexes(tmp_path, lambda: now[0])
    index = indexes.get("linked")
    answer = Bucket.current

    def slow(self: Bucket) -> tuple[str, IndexFacts]:
        asked.append(now[0])
        now[0] += 30
        return answer(self)

    monkeypatch.setattr(Bucket, "current", slow)
    for now[0] in (4.0, 6.0):
        assert indexes.get("linked") is index
    assert indexes.get("linked") is index
    now[0] = 42.0
    assert indexes.get("linked") is index and asked == [6.0, 42.0]


def test_what_is_open_needs_its_storage_no_more(client, photos: Path, tmp_path: Path) -> None:
    build(str(photos), tmp_path / "index", FakeRelease())
    publish(tmp_path / "index", URL)
    link(URL, tmp_path / "linked")
    index = open_index(tmp_path / "linked")
    for key in keys(client):
        client.delete_object(Bucket="pictures", Key=key)
    assert len(index.search(QUERY, where="width > 1", thumbnails=True)) == 5


def test_the_cache_keeps_nothing_of_killed_downloads_and_says_that_it_is_full(
    client, refusing: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put_object(
        Bucket="pictures",
        Key="indexes/photos/g-0123456789abcdef/search/x",
        Body=b"x" * (1 << 20),
    )
    bucket = Bucket(URL)
    generation = "g-0123456789abcdef"
    assert (bucket.fetch(generation) / "x").stat().st_size == 1 << 20
    (own,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(own / generation)
    (own / ".g-fedcba9876543210.new").mkdir()
    bucket.fetch(generation)
    assert [path.name for path in own.iterdir()] == [generation]
    with small_disk(tmp_path / "small", "600k"):
        monkeypatch.setenv(storage.CACHE, str(tmp_path / "small"))
        with pytest.raises(
            RAdapterError, match="cannot write the cache .*small.*RADAPTER_CACHE=DIR"
        ):
            bucket.fetch(generation)
        (own,) = (tmp_path / "small").iterdir()
        assert not list(own.iterdir())
    monkeypatch.setenv(storage.CACHE, str(photos / "0.png"))
    with pytest.raises(RAdapterError, match="cannot write the cache"):
        bucket.fetch(generation)
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing)
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "other"))
    with pytest.raises(RAdapterError, match="can't be used.*AWS_ENDPOINT_URL"):
        bucket.fetch(generation)


def test_an_outage_takes_no_image_out_of_an_index(
    client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in photos.iterdir():
        client.upload_file(str(path), "pictures", f"raw/{path.name}")
    release = FakeRelease()
    out = tmp_path / "index"
    build("s3://pictures/raw", out, release, on_broken="skip")
    asked = storage.file_system()

    class Failing:
        def get_file_info(self, where: object) -> object:
            return asked.get_file_info(where)

        def open_input_stream(self, path: str) -> object:
            if path.endswith("3.png"):
                raise OSError("AWS Error NETWORK_CONNECTION")
            return asked.open_input_stream(path)

    with monkeypatch.context() as patch:
        patch.setattr(stored, "file_system", Failing)
        with pytest.raises(
            RAdapterError, match=r"s3://pictures/raw/3.png can't be read: AWS Error NETWORK_CONN"
        ):
            build("s3://pictures/raw", out, release, on_broken="skip")
    assert len(open_index(out)) == 5 and build("s3://pictures/raw", out, release).kept == 5


def test_an_address_with_two_slashes_is_refused_in_one_line(
    client, photos: Path, tmp_path: Path
) -> None:
    client.upload_file(str(photos / "0.png"), "pictures", "raw/0.png")
    with pytest.raises(RAdapterError, match="s3://pictures//raw is no place on object storage"):
        build("s3://pictures//raw", tmp_path / "index", FakeRelease())
    names = ["s3://pictures/raw/0.png", "s3://pictures/raw//x.png"]
    parquet.write_table(pa.table({"image": names}), tmp_path / "t.parquet")
    summary = build(
        f"parquet:{tmp_path / 't.parquet'}", tmp_path / "index", FakeRelease(), on_broken="skip"
    )
    assert summary.count == 1 and summary.broken == {"s3://pictures/raw//x.png": "no such object"}


def test_exported_embeddings_name_images_on_object_storage(
    client, photos: Path, tmp_path: Path
) -> None:
    client.upload_file(str(photos / "0.png"), "pictures", "raw/0.png")
    build("s3://pictures/raw", tmp_path / "index", FakeRelease())
    export_embeddings(tmp_path / "index", tmp_path / "out")
    table = parquet.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet")
    assert table["image_path"].to_pylist() == ["s3://pictures/raw/0.png"]


def test_refusals(client, photos: Path, tmp_path: Path) -> None:
    for url in (
        "s3://",
        "s3://pictures",
        "s3://pictures/../x",
        "s3://key:secret@pictures/x",
        "gs://pictures/x",
        "x",
    ):
        with pytest.raises(
            RAdapterError, match="no place of an index; allowed: s3://BUCKET/PATH"
        ) as error:
            Bucket(url)
        assert "key:secret" not in str(error.value)
    with pytest.raises(
        RAdapterError, match=f"no index at {URL}; put one there: radapter-index publish"
    ):
        link(URL, tmp_path / "linked")
    build(str(photos), tmp_path / "index", release := FakeRelease())
    publish(tmp_path / "index", URL)
    with pytest.raises(RAdapterError, match="already exists and is not a link"):
        link(URL, tmp_path / "index")
    link(URL, tmp_path / "linked")
    for change in (
        lambda: add(tmp_path / "linked", release),
        lambda: build(str(photos), tmp_path / "linked", release),
    ):
        with pytest.raises(RAdapterError, match="read-only.*radapter-index publish"):
            change()
    for body in (b"{", b"[]", b'{"generation": "../../etc"}', b'{"generation": 3}', b"{}"):
        client.put_object(Bucket="pictures", Key="indexes/photos/index.json", Body=body)
        with pytest.raises(RAdapterError, match="can't be read"):
            open_index(tmp_path / "linked")
    (tmp_path / "linked" / FACTS).write_text(json.dumps({"at": "file:///etc"}))
    with pytest.raises(RAdapterError, match="no place of an index"):
        open_index(tmp_path / "linked")


def test_images_on_object_storage_are_indexed(
    client, refusing: str, photos: Path, tmp_path: Path
) -> None:
    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket="pictures", Key=name, Body=data)

    for path in photos.iterdir():
        put(f"raw/deep/{path.name}", path.read_bytes())
    put("raw/.hidden/x.png", b"x")
    put("raw/notes.txt", b"x")
    release = FakeRelease()
    out = tmp_path / "index"
    summary = build("s3://pictures/raw", out, release)
    assert (summary.count, summary.left_out) == (5, {".txt": 1})
    embeds = embeds_of(release, sorted(photos.iterdir()))
    assert open_index(out).search(embeds[2], 1)[0].id == "s3://pictures/raw/deep/2.png"
    assert verify(out).ok and build("s3://pictures/raw", out, release).kept == 5
    client.delete_object(Bucket="pictures", Key="raw/deep/0.png")
    put("raw/deep/1.png", (photos / "2.png").read_bytes())
    found = verify(out)
    assert (found.missing, found.changed) == (
        ["s3://pictures/raw/deep/0.png"],
        ["s3://pictures/raw/deep/1.png"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", refusing)
        with pytest.raises(RAdapterError, match="can't be used"):
            verify(out)  # what can't be asked is not gone
        with pytest.raises(RAdapterError, match="can't be used"):
            add(out, release, prune=True)
    assert add(out, release, prune=True).removed == 1
    with pytest.raises(RAdapterError, match="s3://pictures/nowhere holds no image"):
        build("s3://pictures/nowhere", tmp_path / "other", release)


def test_a_table_on_object_storage_names_images(client, photos: Path, tmp_path: Path) -> None:
    client.upload_file(str(photos / "0.png"), "pictures", "raw/0.png")
    client.upload_file(str(photos / "1.png"), "pictures", "raw/deep/1.png")
    names = ["0.png", "s3://pictures/raw/deep/1.png", str(photos / "2.png"), "gone.png"]
    parquet.write_table(pa.table({"image": names, "year": [1, 2, 3, 4]}), tmp_path / "t.parquet")
    client.upload_file(str(tmp_path / "t.parquet"), "pictures", "raw/t.parquet")
    source = "parquet:s3://pictures/raw/t.parquet"
    with pytest.raises(
        RAdapterError, match="'s3://pictures/raw/gone.png' can't be indexed: no such object"
    ):
        build(source, tmp_path / "index", FakeRelease())
    summary = build(source, tmp_path / "index", release := FakeRelease(), on_broken="skip")
    assert summary.count == 3
    (hit,) = open_index(tmp_path / "index").search(
        embeds_of(release, [photos / "1.png"])[0], 1, "year = 2"
    )
    assert hit.id == "s3://pictures/raw/deep/1.png" and hit.score == pytest.approx(1, abs=1e-5)
    with pytest.raises(RAdapterError, match="cannot read s3://pictures/none.csv: no such object"):
        build("csv:s3://pictures/none.csv", tmp_path / "other", release)


def test_storage_that_does_not_answer(
    client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "indexes" / "photos").mkdir(parents=True)
    (tmp_path / "indexes" / "photos" / FACTS).write_text(json.dumps({"at": URL}))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(RAdapterError, match="can't be used.*AWS_ENDPOINT_URL"):
        open_index(tmp_path / "indexes" / "photos")
    retrieve = retrieving(FakeRelease(), tmp_path / "indexes", QUERY)
    with pytest.raises(TaskError, match="can't be opened; the server's log says why"):
        retrieve(RetrieveRequest("photos", Query(["a"])))
