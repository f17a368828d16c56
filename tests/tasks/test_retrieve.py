"""The task `retrieve` against numpy, and indexes that come, change and go."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    CANCELLED,
    INDEX_MISMATCH,
    INDEX_REPLACED,
    INVALID_ARGUMENT,
    NOT_CALIBRATED,
    OVERLOADED,
    UNKNOWN_INDEX,
    TaskError,
)
from radapter_serve.contract.images import FifoLimit
from radapter_serve.index import index as opened
from radapter_serve.index.build import add, build
from radapter_serve.index.facts import index_names
from radapter_serve.index.index import Indexes, open_index
from radapter_serve.tasks.retrieve import MAX_PARTS, Query, RetrieveRequest
from tests.helpers.indexes import generation
from tests.helpers.projection import DIM, TEXTS, Searching, embeds_of, projecting
from tests.helpers.small_release import CONFIDENCE
from tests.index.test_index import write


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        write(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def task(folder: Path, **facts: Any) -> Searching:
    return Searching.of(projecting(folder, **facts))


A = Query(["1"])


def test_answers_equal_numpys(photos: Path, tmp_path: Path) -> None:
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


def test_indexes_are_added_changed_and_removed(photos: Path, tmp_path: Path) -> None:
    search = task(tmp_path / "indexes")

    def count() -> int:
        return len(search.ids(RetrieveRequest("photos", A, top_k=100)))

    with pytest.raises(TaskError, match=r"there are: none \(radapter-index build makes them\)"):
        count()
    assert index_names(tmp_path / "indexes") == []
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    assert index_names(tmp_path / "indexes") == ["photos"]
    assert count() == 4 and search.index("photos") is search.index("photos")
    index = search.index("photos")
    write(photos / "new.png", 9)
    add(tmp_path / "indexes" / "photos", projecting())
    assert count() == 5
    (photos / "0.png").unlink()
    build(str(photos), tmp_path / "indexes" / "photos", projecting(), resume=False)
    assert count() == 4
    # An index that is held stays whole.
    hits = index.search(np.eye(DIM, dtype=np.float32)[0], 10, "width > 1")
    assert sorted(hit.id for hit in hits) == [f"{number}.png" for number in range(4)]
    (tmp_path / "indexes" / "photos" / "index.json").write_text("{")
    with pytest.raises(TaskError, match="can't be opened"):
        count()
    shutil.rmtree(tmp_path / "indexes" / "photos")
    with pytest.raises(TaskError) as error:
        count()
    assert error.value.code == UNKNOWN_INDEX


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


def test_unknown_indexes_and_values_out_of_range_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    build(str(photos), tmp_path / "outside", projecting())
    (tmp_path / "indexes" / "broken").mkdir()
    (tmp_path / "indexes" / "broken" / "index.json").write_text("{")
    search = task(tmp_path / "indexes")
    outside = str(tmp_path / "outside")
    long = "b" * 10_001
    for name in ("../outside", "..", ".", "", "photos/", outside, "photos\n", "broken", long):
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
    indexes = Indexes(projecting(tmp_path / "indexes"), opening_seconds=0.1)
    assert len(indexes.get("photos")[0]) == 4
    answers.set()
    assert len(indexes.get("slow")[0]) == 4


def test_a_caller_that_gives_up_waits_for_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    search = task(tmp_path / "indexes")
    request = RetrieveRequest("photos", A, where="path LIKE '%.png'")
    turns = FifoLimit(1, 0, "requests with a new condition")
    monkeypatch.setattr("radapter_serve.index.folder.CONDITION_TURNS", turns)
    with turns():
        with pytest.raises(TaskError, match="too many requests with a new condition") as error:
            search(request)
        assert error.value.code == OVERLOADED
        turns._max_waiting = 1
        answers = iter([False] * 4)
        with pytest.raises(TaskError) as error:
            search(request, lambda: next(answers, True))
        assert error.value.code == CANCELLED
    assert len(search(request).hits) == 4  # nothing of the ended searches was kept
    with turns():
        assert len(search(request).hits) == 4  # the rows of a condition are cached

    # One without a condition ends before the search, and one with a condition while it is met.
    with pytest.raises(TaskError) as error:
        search(RetrieveRequest("photos", Query(ids=["0.png"])), lambda: True)
    assert error.value.code == CANCELLED
    answers = iter([False] * 3)  # before the text, the search and the condition
    with pytest.raises(TaskError) as error:
        search(replace(request, where="path = '0.png'"), lambda: next(answers, True))
    assert error.value.code == CANCELLED and next(answers, None) is None

    # One with ids ends before the embeddings are looked up.
    answers = iter([False])
    with pytest.raises(TaskError) as error:
        search(RetrieveRequest("photos", Query(ids=["0.png"])), lambda: next(answers, True))
    assert error.value.code == CANCELLED


def test_all_callers_of_an_index_that_opens_may_give_up_and_it_opens_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    folders = []

    def slow(folder: Path) -> Any:
        folders.append(folder.name)
        assert answers.wait(20)
        return open_index(folder)

    monkeypatch.setattr(opened, "open_index", slow)
    build(str(photos), tmp_path / "indexes" / "photos", projecting())
    indexes = Indexes(projecting(tmp_path / "indexes"), opening_seconds=0)
    for _ in range(3):
        polls = iter([False])
        with pytest.raises(TaskError) as error:
            indexes.get("photos", partial(next, polls, True))
        assert error.value.code == CANCELLED
    answers.set()
    assert len(indexes.get("photos", lambda: False)[0]) == 4
    assert folders == ["photos"]


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


ODD = ["it's.png", 'quo"te.png', "Ünï 猫.png", "100%_.png", "back\\slash.png"]


@dataclass(frozen=True)
class World:
    """An index of 45 images, of which ten are alike and five have names that need care."""

    folder: Path
    files: list[Path]  # in the order of their ids
    embeds: NDArray[np.float32]  # of the images, [45, D]
    search: Searching

    @property
    def ids(self) -> list[str]:
        return [file.name for file in self.files]

    def find(self, query: Query, **options: Any) -> tuple[list[str], list[float]]:
        hits = self.search(RetrieveRequest("photos", query, **options)).hits
        return [hit.id for hit in hits], [hit.score for hit in hits]

    def best(self, query: NDArray[np.floating[Any]]) -> list[int]:
        """All images by numpy, the best first, equals by their ids."""
        scores = (self.embeds * query.astype(np.float32)).sum(axis=1)
        return sorted(range(len(self.ids)), key=lambda row: (-scores[row], self.ids[row]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("search")
    for number in range(40):
        # Ten have the same pixels.
        write(folder / "photos" / f"{number:02}.png", min(number, 30))
    for number, name in enumerate(ODD):
        write(folder / "photos" / name, 50 + number)
    build(str(folder / "photos"), folder / "indexes" / "photos", projecting())
    files = sorted((folder / "photos").iterdir(), key=lambda file: file.name)
    search = Searching.of(projecting(folder / "indexes"))
    return World(folder / "indexes", files, embeds_of(files), search)


def unit(weights: Sequence[float], vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    total = np.einsum("n,nd->d", np.array(weights, np.float64), np.array(vectors, np.float64))
    return np.asarray(total / np.sqrt((total**2).sum()))


@pytest.mark.parametrize("weights", [None, (1, 1, 1, 1), (0.5, -0.25, 2, 0), (3e38, 1, -3e38, 7)])
def test_a_query_of_several_parts_is_numpys_sum(
    world: World, weights: tuple[float, ...] | None
) -> None:
    image = world.files[5].read_bytes()
    query = Query(["1", "2"], [image], [world.ids[9]], weights)
    ids, scores = world.find(query, top_k=45)
    parts = [TEXTS[1], TEXTS[2], world.embeds[5], world.embeds[9]]
    expected = unit(weights or [1, 1, 1, 1], parts)
    np.testing.assert_allclose(sorted(scores, reverse=True), scores)
    np.testing.assert_allclose(
        scores, np.sort(world.embeds @ expected)[::-1], atol=1e-6, err_msg=str(ids)
    )
    score_of = dict(zip(ids, scores, strict=True))
    np.testing.assert_allclose(
        [score_of[id] for id in world.ids], world.embeds @ expected, atol=1e-6
    )


def test_an_image_of_the_index_is_a_query_by_its_id(world: World) -> None:
    for name in (*ODD, "07.png"):
        row = world.ids.index(name)
        ids, scores = world.find(Query(ids=[name]), top_k=45)
        assert ids == [world.ids[other] for other in world.best(world.embeds[row])]
        assert ids[0] == name
        assert scores[0] == pytest.approx(1, abs=1e-6)


def test_a_least_score_leaves_out_what_is_below_it(world: World) -> None:
    all_ids, scores = world.find(Query(["3"]), top_k=45)
    for least in (-1.0, 0.0, scores[4], np.nextafter(np.float32(scores[4]), np.float32(2)), 1.0):
        expected = [id for id, score in zip(all_ids, scores, strict=True) if score >= least]
        value = np.float32(least)
        assert world.find(Query(["3"]), top_k=45, min_score=value)[0] == expected
        assert world.find(Query(["3"]), top_k=3, min_score=value)[0] == expected[:3]
        assert world.find(Query(["3"]), top_k=3, min_score=value, offset=len(expected))[0] == []
        page = world.find(Query(["3"]), top_k=3, min_score=value, offset=min(2, len(expected)))
        assert page[0] == expected[2:5]


def test_a_page_of_another_version_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "indexes")
    (tmp_path / "photos").mkdir()
    for file in world.files[:20]:
        shutil.copy(file, tmp_path / "photos")
    search = Searching.of(projecting(tmp_path / "indexes"))
    request = RetrieveRequest("photos", Query(["1"]), top_k=5, offset=0)
    version = search(request).index_version
    following = replace(request, offset=5, index_version=version)
    assert len(search.ids(following)) == 5
    build(str(tmp_path / "photos"), tmp_path / "indexes" / "photos", projecting())
    with pytest.raises(TaskError, match=r"'photos' has another version.*offset 0") as caught:
        search(following)
    assert caught.value.code == INDEX_REPLACED
    assert "\n" not in str(caught.value)
    assert search(request).index_version != version


def calibrated(world: World, *, alpha: float = 0.5, **confidence: Any) -> Searching:
    """The task of a release that was fitted to validation data."""
    fitted = replace(CONFIDENCE, **{"min_score": None, **confidence})
    release = projecting(world.folder, alpha=alpha, dynamic_alpha=True, confidence=fitted)
    return Searching.of(release)


def test_the_calibrated_least_score_is_the_releases(world: World) -> None:
    _, scores = world.find(Query(["3"]), top_k=45)
    search = calibrated(world, min_score=scores[6])
    request = RetrieveRequest("photos", Query(["3"]), top_k=45, calibrated=True)
    assert [hit.score for hit in search(request).hits] == scores[:7]
    for query in (
        Query(["1", "2"]),
        Query(["1"], weights=[-1]),
        Query(ids=["00.png"]),
        Query(images=[world.files[0].read_bytes()]),
    ):
        with pytest.raises(TaskError, match="calibrated is for a search with one text; give a num"):
            replace(request, query=query)
    with pytest.raises(TaskError, match="give min_score or calibrated, not both"):
        replace(request, min_score=0.1)


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        (None, "no calibrated scores; .*--validation DATA"),
        ({}, "no calibrated least score; .*--validation DATA"),
        ({"alpha": 0.25, "min_score": 0.5}, r"calibrated at alpha 0\.25, not at 0\.5"),
    ],
)
def test_a_release_without_a_calibrated_least_score_says_so(
    world: World, fitted: dict[str, Any] | None, message: str
) -> None:
    search = world.search if fitted is None else calibrated(world, **fitted)
    with pytest.raises(TaskError, match=message) as caught:
        search(RetrieveRequest("photos", Query(["3"]), calibrated=True))
    assert caught.value.code == NOT_CALIBRATED


ONE = {"texts": ["1"]}
TWO = {"texts": ["1", "2"]}
NAN = float("nan")


@pytest.mark.parametrize(
    ("query", "options", "why"),
    [
        ({}, {}, "nothing to search for"),
        ({"texts": ["1"] * (MAX_PARTS + 1)}, {}, "17 texts, images and ids; at most 16"),
        (ONE, {"weights": [1, 2]}, "2 weights for 1 texts"),
        (TWO, {"weights": [1, NAN]}, "a weight is nan"),
        (TWO, {"weights": [float("inf"), 1]}, "a weight is inf"),
        ({"texts": ["1", "1"]}, {"weights": [1, -0.9999]}, "cancel to nothing"),
        (ONE, {"weights": [0]}, "the weights 0 cancel to nothing"),
        ({"ids": ["none.png"]}, {}, "the index 'photos' has no image 'none.png'"),
        ({"ids": ["x" * 10_001]}, {}, "a name of an image of 10001 characters"),
        (ONE, {"top_k": 1001}, "top_k is 1001"),
        (ONE, {"offset": -1}, "offset is -1; allowed"),
        (ONE, {"offset": 46}, "offset is 46, past the end; this search finds 45"),
        (ONE, {"offset": 9, "where": "path < '05'"}, "offset is 9, past the end.* 5 images"),
        (ONE, {"min_score": NAN}, "min_score is nan; allowed"),
        (ONE, {"min_score": 1.5}, "min_score is 1.5; allowed"),
    ],
)
def test_invalid_queries_are_refused(
    world: World, query: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    others = {**options}
    weights = others.pop("weights", None)
    with pytest.raises(TaskError, match=why) as caught:
        world.find(Query(**query, weights=weights), **others)
    assert caught.value.code == INVALID_ARGUMENT
    assert "\n" not in str(caught.value)
