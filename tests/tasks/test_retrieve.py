"""The task `retrieve` without a server: names, indexes that come, change and go, and what is
computed when.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    INDEX_MISMATCH,
    INVALID_ARGUMENT,
    UNKNOWN_INDEX,
    TaskError,
)
from radapter_serve.index import opened
from radapter_serve.index.build import add, build
from radapter_serve.index.facts import index_names
from radapter_serve.index.index import open_index
from radapter_serve.index.opened import OpenIndexes
from radapter_serve.tasks.query import Query
from radapter_serve.tasks.retrieve import Retrieve, RetrieveRequest
from tests.helpers.indexes import searched
from tests.index.test_index import FakeRelease, embeds_of, write
from tests.index.test_neighbours import SMALL, Ready, clustered, write_numbers


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        write(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def task(folder: Path, release: FakeRelease) -> Retrieve:
    def embed_image(image: bytes) -> NDArray[np.float32]:
        return release.encode_images([release.prepare(image)])[0]

    def embed_text(text: bytes) -> NDArray[np.float32]:
        return np.eye(16, dtype=np.float32)[len(text)]

    return Retrieve(release.facts, folder, embed_text, embed_image)


def test_answers_and_what_they_cost(photos: Path, tmp_path: Path) -> None:
    release = FakeRelease()
    build(str(photos), tmp_path / "indexes" / "photos", release)
    retrieve = task(tmp_path / "indexes", release)
    embeds = embeds_of(release, sorted(photos.iterdir()))
    found = retrieve(RetrieveRequest(b"photos", Query([b"abc"]), top_k=2))
    best = np.argsort(-embeds[:, 3])[:2]
    assert list(found.ids) == [f"{number}.png" for number in best] and found.thumbnails is None
    np.testing.assert_allclose(found.scores, embeds[best, 3], atol=1e-6)
    assert [json.loads(text)["path"] for text in found.metadata] == list(found.ids)
    image = (photos / "2.png").read_bytes()
    found = retrieve(RetrieveRequest(b"photos", Query(images=[image]), thumbnails=True))
    assert found.ids[0] == "2.png" and len(found.ids) == 4 and found.thumbnails is not None
    assert all(thumbnail.startswith(b"\xff\xd8") for thumbnail in found.thumbnails)
    assert len(retrieve(RetrieveRequest(b"photos", Query([b"a"]), where=b"path = 'x'")).ids) == 0


def test_indexes_come_change_and_go(photos: Path, tmp_path: Path) -> None:
    release = FakeRelease()
    retrieve = task(tmp_path / "indexes", release)

    def count() -> int:
        return len(retrieve(RetrieveRequest(b"photos", Query([b"a"]), top_k=100)).ids)

    with pytest.raises(TaskError, match=r"there are: none \(radapter-index build makes them\)"):
        count()
    assert index_names(tmp_path / "indexes") == []
    build(str(photos), tmp_path / "indexes" / "photos", release)
    assert index_names(tmp_path / "indexes") == ["photos"]
    assert count() == 4 and retrieve.index("photos") is retrieve.index("photos")
    write(photos / "new.png", 9)
    add(tmp_path / "indexes" / "photos", release)
    assert count() == 5
    (photos / "0.png").unlink()
    build(str(photos), tmp_path / "indexes" / "photos", release)
    assert count() == 4
    shutil.rmtree(tmp_path / "indexes" / "photos")
    with pytest.raises(TaskError) as error:
        count()
    assert error.value.code == UNKNOWN_INDEX


def test_an_index_that_is_held_stays_whole_while_it_is_replaced(
    photos: Path, tmp_path: Path
) -> None:
    release = FakeRelease()
    out = tmp_path / "indexes" / "photos"
    build(str(photos), out, release)
    retrieve = task(tmp_path / "indexes", release)
    held = retrieve.index("photos")
    (photos / "0.png").unlink()
    build(str(photos), out, release, resume=False)
    query = np.eye(16, dtype=np.float32)[0]
    assert len(held.search(query, 10, "width > 1")) == 4 and len(retrieve.index("photos")) == 3
    assert retrieve.index("photos") is retrieve.index("photos") is not held
    (searched(out) / "rows.arrow").unlink()
    with pytest.raises(TaskError, match="can't be opened; the server's log says why"):
        task(tmp_path / "indexes", release)(RetrieveRequest(b"photos", Query([b"a"])))


def test_an_index_that_is_broken_is_tried_again_after_ten_seconds(
    photos: Path, tmp_path: Path
) -> None:
    release = FakeRelease()
    out = tmp_path / "indexes" / "photos"
    build(str(photos), out, release)
    data = searched(out) / "vectors.npy"
    data.rename(out / "aside")
    now = [0.0]
    indexes = OpenIndexes(tmp_path / "indexes", lambda: now[0])
    with pytest.raises(TaskError):
        indexes.get("photos")
    (out / "aside").rename(data)
    now[0] = 9.0
    with pytest.raises(TaskError, match="can't be opened"):
        indexes.get("photos")
    now[0] = 11.0
    assert len(indexes.get("photos")) == 4


def test_nothing_fails_while_an_index_of_many_images_is_replaced(tmp_path: Path) -> None:
    """By additions and as a whole, while two threads search: every answer is of one state or
    another.
    """
    vectors, texts = clustered(700, 32, 20)
    release = Ready(vectors, texts[:50])
    photos = tmp_path / "photos"
    out = tmp_path / "indexes" / "photos"
    write_numbers(photos, range(300))
    build(str(photos), out, release, sizes=SMALL)
    retrieve = Retrieve(
        release.facts, tmp_path / "indexes", lambda text: vectors[int(text)], lambda _: vectors[0]
    )
    over = threading.Event()
    failed: list[str] = []
    counts: list[int] = []

    def search() -> None:
        while not over.is_set():
            try:
                found = retrieve(RetrieveRequest(b"photos", Query([b"5"]), top_k=1000))
                assert found.ids[0] == "000005.jpg" and len(set(found.ids)) == len(found.ids)
                counts.append(len(found.ids))
            except Exception as error:
                failed.append(repr(error))
            over.wait(0.01)

    searching = [threading.Thread(target=search) for _ in range(2)]
    for one in searching:
        one.start()
    states = {300}
    try:
        for count in (320, 340, 360, 380):
            write_numbers(photos, range(count))
            states.add(count)
            if count % 40:
                add(out, release, sizes=SMALL)
            else:
                build(str(photos), out, release, resume=False, sizes=SMALL)
    finally:
        over.set()
        for one in searching:
            one.join()
    assert not failed and len(counts) > 10 and set(counts) <= states


def test_refusals(photos: Path, tmp_path: Path) -> None:
    build(str(photos), tmp_path / "indexes" / "photos", FakeRelease())
    build(str(photos), tmp_path / "outside", FakeRelease())
    (tmp_path / "indexes" / "broken").mkdir()
    (tmp_path / "indexes" / "broken" / "index.json").write_text("{")
    retrieve = task(tmp_path / "indexes", FakeRelease())
    for name in (
        b"../outside",
        b"..",
        b".",
        b"",
        b"photos/",
        str(tmp_path / "outside").encode(),
        b"photos\n",
        b"broken",
    ):
        with pytest.raises(TaskError) as error:
            retrieve(RetrieveRequest(name, Query([b"a"])))
        assert error.value.code == UNKNOWN_INDEX and str(tmp_path / "indexes") not in str(
            error.value
        )
    for request in (
        RetrieveRequest(b"photos"),
        RetrieveRequest(b"photos", Query([b"a"]), where=b"\xff"),
        RetrieveRequest(b"\xff", Query([b"a"])),
        RetrieveRequest(b"photos", Query([b"a"]), top_k=0),
    ):
        with pytest.raises(TaskError) as error:
            retrieve(request)
        assert error.value.code == INVALID_ARGUMENT
    with pytest.raises(TaskError, match=r"alpha 0\.5.*alpha 0\.9.*; the server's log has") as error:
        task(tmp_path / "indexes", FakeRelease(alpha=0.9))(
            RetrieveRequest(b"photos", Query([b"a"]))
        )
    assert error.value.code == INDEX_MISMATCH and str(tmp_path) not in str(error.value)


def test_a_long_name_is_not_sent_back_whole(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"^\[unknown_index\]") as caught:
        task(tmp_path, FakeRelease())(RetrieveRequest(b"b" * 10_001, Query([b"a"])))
    assert len(str(caught.value)) < 200


def test_indexes_are_opened_before_the_first_search(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """All but one that is broken, which the log says at once; the others are searched."""
    release = FakeRelease()
    for name in ("photos", "broken"):
        build(str(photos), tmp_path / "indexes" / name, release)
    (searched(tmp_path / "indexes" / "broken") / "vectors.npy").unlink()
    prepared: list[bool] = []
    monkeypatch.setattr(opened, "prepare", lambda: prepared.append(True))
    task(tmp_path / "nowhere", release)
    assert not prepared
    retrieve = task(tmp_path / "indexes", release)
    assert prepared and "the index" in capsys.readouterr().err
    monkeypatch.setattr(opened, "open_index", lambda *_: pytest.fail("opened by a caller"))
    assert len(retrieve(RetrieveRequest(b"photos", Query([b"a"]))).ids) == 4
    with pytest.raises(TaskError, match="'broken' can't be opened"):
        retrieve(RetrieveRequest(b"broken", Query([b"a"])))


def test_a_storage_that_does_not_answer_does_not_keep_a_server_from_being_ready(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def slow(folder: Path) -> Any:
        if folder.name == "slow":
            answers.wait(20)
        return open_index(folder)

    monkeypatch.setattr(opened, "open_index", slow)
    for name in ("photos", "slow"):
        build(str(photos), tmp_path / "indexes" / name, FakeRelease())
    indexes = OpenIndexes(tmp_path / "indexes", time.monotonic)
    indexes.open_all(seconds=0.1)
    assert len(indexes.get("photos")) == 4
    answers.set()
    assert len(indexes.get("slow")) == 4
