"""The task `retrieve` without a server: names, indexes that come, change and go, and what is
computed when.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract.errors import (
    INDEX_MISMATCH,
    INVALID_ARGUMENT,
    UNKNOWN_INDEX,
    TaskError,
)
from radapter_serve.encoders.loaded import complete
from radapter_serve.index import index as opened
from radapter_serve.index.build import add, build
from radapter_serve.index.facts import index_names
from radapter_serve.index.index import Indexes, open_index
from radapter_serve.tasks.retrieve import Query, RetrieveRequest, retrieve
from tests.helpers.indexes import generation
from tests.helpers.projection import DIM, TEXTS, Searching, embeds_of, projecting
from tests.index.test_index import write


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        write(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def task(folder: Path, **facts: Any) -> Searching:
    return Searching.of(projecting(folder, **facts))


A = Query(["1"])


def test_answers_and_what_they_cost(photos: Path, tmp_path: Path) -> None:
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    search = task(tmp_path / "indexes")
    scores = embeds_of(sorted(photos.iterdir())) @ TEXTS[3]
    hits = search(RetrieveRequest("photos", Query(["3"]), top_k=2)).hits
    best = np.argsort(-scores)[:2]
    assert [hit.id for hit in hits] == [f"{number}.png" for number in best]
    assert [hit.thumbnail for hit in hits] == [b"", b""]
    np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-6)
    assert [hit.metadata["path"] for hit in hits] == [hit.id for hit in hits]
    image = (photos / "2.png").read_bytes()
    hits = search(RetrieveRequest("photos", Query(images=[image]), thumbnails=True)).hits
    assert hits[0].id == "2.png" and len(hits) == 4
    assert all(hit.thumbnail.startswith(b"\xff\xd8") for hit in hits)
    assert search.ids(RetrieveRequest("photos", A, where="path = 'x'")) == []


def test_indexes_come_change_and_go(photos: Path, tmp_path: Path) -> None:
    search = task(tmp_path / "indexes")

    def count() -> int:
        return len(search.ids(RetrieveRequest("photos", A, top_k=100)))

    with pytest.raises(TaskError, match=r"there are: none \(radapter-index build makes them\)"):
        count()
    assert index_names(tmp_path / "indexes") == []
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    assert index_names(tmp_path / "indexes") == ["photos"]
    assert count() == 4 and search.index("photos") is search.index("photos")
    write(photos / "new.png", 9)
    add(tmp_path / "indexes" / "photos", projecting())
    assert count() == 5
    (photos / "0.png").unlink()
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    assert count() == 4
    shutil.rmtree(tmp_path / "indexes" / "photos")
    with pytest.raises(TaskError) as error:
        count()
    assert error.value.code == UNKNOWN_INDEX


def test_an_index_that_is_held_stays_whole_while_it_is_replaced(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "indexes" / "photos"
    build(str(photos), out, projecting())
    search = task(tmp_path / "indexes")
    held = search.index("photos")
    (photos / "0.png").unlink()
    build(str(photos), out, projecting(), resume=False)
    query = np.eye(DIM, dtype=np.float32)[0]
    assert len(held.search(query, 10, "width > 1")) == 4 and len(search.index("photos")) == 3
    assert search.index("photos") is search.index("photos") is not held
    (generation(out) / "rows.arrow").unlink()
    with pytest.raises(TaskError, match="can't be opened; the server's log says why"):
        task(tmp_path / "indexes")(RetrieveRequest("photos", A))


def test_an_index_that_is_broken_is_tried_again_after_ten_seconds(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "indexes" / "photos"
    build(str(photos), out, projecting())
    data = generation(out) / "vectors.npy"
    data.rename(out / "aside")
    now = [0.0]
    indexes = Indexes(projecting(tmp_path / "indexes"), clock=lambda: now[0])
    with pytest.raises(TaskError):
        indexes.get("photos")
    (out / "aside").rename(data)
    now[0] = 9.0
    with pytest.raises(TaskError, match="can't be opened"):
        indexes.get("photos")
    now[0] = 11.0
    assert len(indexes.get("photos")[0]) == 4


def test_refusals(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    build(str(photos), tmp_path / "outside", projecting())
    (tmp_path / "indexes" / "broken").mkdir()
    (tmp_path / "indexes" / "broken" / "index.json").write_text("{")
    search = task(tmp_path / "indexes")
    outside = str(tmp_path / "outside")
    for name in (
        "../outside",
        "..",
        ".",
        "",
        "photos/",
        outside,
        "photos\n",
        "broken",
        "b" * 10_001,
    ):
        with pytest.raises(TaskError) as error:
            search(RetrieveRequest(name, A))
        assert error.value.code == UNKNOWN_INDEX and len(str(error.value)) < 200
        assert str(tmp_path / "indexes") not in str(error.value)
    with pytest.raises(TaskError) as error:
        search(RetrieveRequest("photos", A, top_k=0))
    assert error.value.code == INVALID_ARGUMENT
    # An index of another release: the log has the command that builds it again, once.
    capsys.readouterr()
    other = task(tmp_path / "indexes", alpha=0.9)
    for _ in range(2):
        with pytest.raises(TaskError, match=r"alpha 0\.5.*alpha 0\.9.*; the server's log") as error:
            other(RetrieveRequest("photos", A))
        assert error.value.code == INDEX_MISMATCH and str(tmp_path) not in str(error.value)
    assert capsys.readouterr().err.count("the index 'photos'") == 1


def test_an_index_is_searched_by_the_release_that_made_it(photos: Path, tmp_path: Path) -> None:
    build(str(photos), tmp_path / "indexes" / "photos", projecting(alpha=0.9))
    older = projecting(alpha=0.9, texts=TEXTS[::-1])
    indexes = Indexes(projecting(tmp_path / "indexes"), lambda: [projecting(alpha=0.1), older])
    found = complete(retrieve(indexes, RetrieveRequest("photos", Query(["3"])))).hits
    embeds = embeds_of([photos / hit.id for hit in found])
    np.testing.assert_allclose([hit.score for hit in found], embeds @ TEXTS[-4], atol=1e-6)
    assert indexes.get("photos")[1] is older


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
        build(str(photos), tmp_path / "indexes" / name, projecting())
    indexes = Indexes(projecting(tmp_path / "indexes"), opening=0.1)
    assert len(indexes.get("photos")[0]) == 4
    answers.set()
    assert len(indexes.get("slow")[0]) == 4


def test_indexes_are_opened_before_the_first_search(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """All but one that is broken, which the log says at once; the others are searched."""
    for name in ("photos", "broken"):
        build(str(photos), tmp_path / "indexes" / name, projecting())
    (generation(tmp_path / "indexes" / "broken") / "vectors.npy").unlink()
    search = task(tmp_path / "indexes")
    assert "the index" in capsys.readouterr().err
    monkeypatch.setattr(opened, "open_index", lambda *_: pytest.fail("opened by a caller"))
    assert len(search.ids(RetrieveRequest("photos", A))) == 4
    with pytest.raises(TaskError, match="'broken' can't be opened"):
        search(RetrieveRequest("broken", A))
