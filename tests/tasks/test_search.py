"""What a search may ask for: queries of several parts, pages and a least score, against numpy."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from radapter_serve.tasks.scores import fitted_min_score

from radapter_serve.contract.errors import (
    INDEX_REPLACED,
    INVALID_ARGUMENT,
    NOT_CALIBRATED,
    TaskError,
)
from radapter_serve.index.build import build
from radapter_serve.tasks.query import MAX_PARTS, Query, combine
from radapter_serve.tasks.retrieve import Retrieve, RetrieveRequest
from radapter_serve.tasks.table import TASKS
from tests.index.test_index import DIM, FakeRelease, embeds_of, write

ODD = ["it's.png", 'quo"te.png', "Ünï 猫.png", "100%_.png", "back\\slash.png"]
TEXTS = np.random.default_rng(7).standard_normal((9, DIM)).astype(np.float32)
TEXTS /= np.linalg.norm(TEXTS, axis=1, keepdims=True)


@dataclass(frozen=True)
class World:
    """An index of 45 images, of which ten are alike and five have names that need care.

    Args:
        folder: of the index's folder.
        files: the images, in the order of their ids.
        embeds: of the images, float32 [45, D].
        retrieve: the task.
    """

    folder: Path
    files: list[Path]
    embeds: NDArray[np.float32]
    retrieve: Retrieve

    @property
    def ids(self) -> list[str]:
        return [file.name for file in self.files]

    def find(self, query: Query, **options: Any) -> tuple[list[str], list[float]]:
        found = self.retrieve(RetrieveRequest(b"photos", query, **options))
        return list(found.ids), found.scores.tolist()

    def best(self, query: NDArray[np.floating[Any]]) -> list[int]:
        """By numpy: all images, the best first, equals by their ids."""
        scores = (self.embeds * query.astype(np.float32)).sum(axis=1)
        return sorted(range(len(self.ids)), key=lambda row: (-scores[row], self.ids[row]))


def task(folder: Path, release: FakeRelease) -> Retrieve:
    return Retrieve(
        release.facts,
        folder,
        lambda text, **told: TEXTS[int(text)],
        lambda image, **told: release.encode_images([release.prepare(image)])[0],
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("search")
    for number in range(40):
        # Ten have the same pixels.
        write(folder / "photos" / f"{number:02}.png", min(number, 30))
    for number, name in enumerate(ODD):
        write(folder / "photos" / name, 50 + number)
    release = FakeRelease()
    build(str(folder / "photos"), folder / "indexes" / "photos", release)
    files = sorted((folder / "photos").iterdir(), key=lambda file: file.name)
    embeds = embeds_of(release, files)
    return World(folder / "indexes", files, embeds, task(folder / "indexes", release))


def unit(weights: Sequence[float], vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    total = np.einsum("n,nd->d", np.array(weights, np.float64), np.array(vectors, np.float64))
    return np.asarray(total / np.sqrt((total**2).sum()))


@pytest.mark.parametrize("weights", [None, (1, 1, 1, 1), (0.5, -0.25, 2, 0), (3e38, 1, -3e38, 7)])
def test_a_query_of_several_parts_is_numpys_sum(
    world: World, weights: tuple[float, ...] | None
) -> None:
    image = world.files[5].read_bytes()
    query = Query([b"1", b"2"], [image], [world.ids[9].encode()], weights)
    ids, scores = world.find(query, top_k=45)
    parts = [TEXTS[1], TEXTS[2], world.embeds[5], world.embeds[9]]
    expected = unit(weights or [1, 1, 1, 1], parts)
    np.testing.assert_allclose(sorted(scores, reverse=True), scores)
    np.testing.assert_allclose(
        scores, np.sort(world.embeds @ expected)[::-1], atol=1e-6, err_msg=str(ids)
    )
    found = dict(zip(ids, scores, strict=True))
    np.testing.assert_allclose([found[id] for id in world.ids], world.embeds @ expected, atol=1e-6)


def test_the_sum_is_numpys_and_one_part_stays_as_it_is() -> None:
    weights = [0.7, -0.3, 1.5]
    vectors = list(TEXTS[:3])
    expected = unit([weight / 1.5 for weight in weights], vectors).astype(np.float32)
    assert np.abs(combine(vectors, weights) - expected).max() <= 2e-8
    assert combine(vectors[:1], [1.0]) is vectors[0]
    np.testing.assert_allclose(combine([TEXTS[0]], [-2.0]), -TEXTS[0], atol=1e-7)


def test_an_image_of_the_index_asks_by_its_id(world: World) -> None:
    for name in (*ODD, "07.png"):
        row = world.ids.index(name)
        ids, scores = world.find(Query(ids=[name.encode()]), top_k=45)
        assert ids == [world.ids[other] for other in world.best(world.embeds[row])]
        assert ids[0] == name
        assert scores[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("where", [None, b"path < '35'"])
@pytest.mark.parametrize("size", [7, 10, 45])
def test_pages_put_together_are_one_large_page(
    world: World, where: bytes | None, size: int
) -> None:
    # The images that are alike are asked for, so that pages end between equals.
    query = Query(ids=[b"33.png"])
    whole, scores = world.find(query, top_k=100, offset=0, where=where)
    alike = [f"{number}.png" for number in range(30, 35 if where else 40)]
    assert whole[: len(alike)] == alike
    pages: list[tuple[str, float]] = []
    while True:
        page = world.find(query, top_k=size, offset=len(pages), where=where)
        if not page[0]:
            break
        pages += zip(*page, strict=True)
    assert pages == list(zip(whole, scores, strict=True))
    assert len(pages) == (36 if where else 45)  # with 100%_.png


def test_a_least_score_leaves_out_what_is_below_it(world: World) -> None:
    all_ids, scores = world.find(Query([b"3"]), top_k=45)
    for least in (-1.0, 0.0, scores[4], np.nextafter(np.float32(scores[4]), np.float32(2)), 1.0):
        kept = [id for id, score in zip(all_ids, scores, strict=True) if score >= least]
        value = np.float32(least)
        assert world.find(Query([b"3"]), top_k=45, min_score=value)[0] == kept
        assert world.find(Query([b"3"]), top_k=3, min_score=value)[0] == kept[:3]
        assert world.find(Query([b"3"]), top_k=3, min_score=value, offset=len(kept))[0] == []
        page = world.find(Query([b"3"]), top_k=3, min_score=value, offset=min(2, len(kept)))
        assert page[0] == kept[2:5]


def test_a_page_of_another_version_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "indexes")
    (tmp_path / "photos").mkdir()
    for file in world.files[:20]:
        shutil.copy(file, tmp_path / "photos")
    release = FakeRelease()
    retrieve = task(tmp_path / "indexes", release)
    request = RetrieveRequest(b"photos", Query([b"1"]), top_k=5, offset=0)
    version = retrieve(request).index_version.encode()
    following = replace(request, offset=5, index_version=version)
    assert len(retrieve(following).ids) == 5
    build(str(tmp_path / "photos"), tmp_path / "indexes" / "photos", release)
    with pytest.raises(TaskError, match=r"'photos' has another version.*offset 0") as caught:
        retrieve(following)
    assert caught.value.code == INDEX_REPLACED
    assert "\n" not in str(caught.value)
    assert retrieve(request).index_version.encode() != version


def calibrated(world: World, alpha: float = 0.5, **confidence: Any) -> Retrieve:
    """The task of a release that was fitted to validation data."""
    release = FakeRelease(alpha)
    fitted: dict[str, Any] = dict.fromkeys(("scale", "bias", "ece_before", "label_ece"), 0.0)
    fitted |= {"dataset": "photos", "n": 100, "classes": 2, **confidence}
    release.facts = replace(release.facts, confidence=fitted)
    return task(world.folder, release)


def test_the_calibrated_least_score_is_the_releases(world: World) -> None:
    _, scores = world.find(Query([b"3"]), top_k=45)
    retrieve = calibrated(world, min_score=scores[6])
    request = RetrieveRequest(b"photos", Query([b"3"]), top_k=45, calibrated=True)
    assert retrieve(request).scores.tolist() == scores[:7]
    for query in (
        Query([b"1", b"2"]),
        Query([b"1"], weights=[-1]),
        Query(ids=[b"00.png"]),
        Query(images=[world.files[0].read_bytes()]),
    ):
        with pytest.raises(TaskError, match="calibrated is for a search by one text; give a numb"):
            retrieve(replace(request, query=query))
    with pytest.raises(TaskError, match="give min_score or calibrated, not both"):
        retrieve(replace(request, min_score=0.1))


def test_without_a_calibrated_least_score_the_command_is_named(world: World) -> None:
    request = RetrieveRequest(b"photos", Query([b"3"]), calibrated=True)
    how = "radapter-export --validation DATA"
    # A release without validation data, and one of an earlier export.
    for retrieve in (world.retrieve, calibrated(world)):
        with pytest.raises(TaskError, match=f"no calibrated least score; .*{how}") as caught:
            retrieve(request)
        assert caught.value.code == NOT_CALIBRATED
        assert "\n" not in str(caught.value)


def test_a_least_score_belongs_to_its_alpha() -> None:
    facts = FakeRelease(0.25).facts
    fitted: dict[str, Any] = {
        "scale": 1.0,
        "bias": 0.0,
        "dataset": "photos",
        "n": 100,
        "classes": 2,
    }
    fitted |= {"ece_before": 0.0, "label_ece": 0.0, "min_score": 0.5}
    facts = replace(facts, confidence=fitted)
    assert fitted_min_score(facts, 0.25) == 0.5
    with pytest.raises(TaskError, match="calibrated at alpha 0.25, and the index is at 0.5"):
        fitted_min_score(facts, 0.5)


NAN = float("nan")
INFINITE = float("inf")
A = Query([b"1"])


@pytest.mark.parametrize(
    ("query", "options", "why"),
    [
        (Query(), {}, "nothing to search for"),
        (Query([b"1"] * (MAX_PARTS + 1)), {}, "17 texts, images and ids; at most 16"),
        (Query([b"1"], weights=[1, 2]), {}, "2 weights for 1 texts"),
        (Query([b"1", b"2"], weights=[1, NAN]), {}, "a weight is nan; allowed are finite"),
        (Query([b"1", b"2"], weights=[INFINITE, 1]), {}, "a weight is inf; allowed are finite"),
        (Query([b"1", b"1"], weights=[1, -1]), {}, "the weights 1, -1 cancel to nothing"),
        (Query([b"1", b"1"], weights=[1, -0.9999]), {}, "cancel to nothing"),
        (Query([b"1"], weights=[0]), {}, "the weights 0 cancel to nothing"),
        (Query(ids=[b"none.png"]), {}, "the index 'photos' has no image 'none.png'"),
        (Query(ids=[b"x" * 10_001]), {}, "a name of an image of 10001 characters"),
        (Query(ids=[b"' OR 1 = 1 --"]), {}, "has no image"),
        (Query(ids=[b"\xff"]), {}, "id is not UTF-8"),
        (A, {"offset": -1}, "offset is -1; allowed are whole numbers from 0 to 1000"),
        (A, {"offset": 1001}, "offset is 1001; allowed"),
        (A, {"offset": 46}, "offset is 46, past the end; this search finds 45 images"),
        (A, {"offset": 9, "where": b"path < '05'"}, "offset is 9, past the end.* 5 images"),
        (A, {"min_score": NAN}, "min_score is nan; allowed are numbers from -1 to 1"),
        (A, {"min_score": 1.5}, "min_score is 1.5; allowed"),
        (A, {"min_score": -INFINITE}, "min_score is -inf; allowed"),
    ],
)
def test_refusals(world: World, query: Query, options: dict[str, Any], why: str) -> None:
    with pytest.raises(TaskError, match=why) as caught:
        world.find(query, **options)
    assert caught.value.code == INVALID_ARGUMENT
    assert "\n" not in str(caught.value)


class Arrays(dict[str, Any]):
    """What a request brings, as a server has it."""

    cancelled = staticmethod(lambda: False)

    def wants(self, output: str) -> bool:
        return output == "thumbnail"


def test_a_request_is_read_from_its_arrays(world: World) -> None:
    image = world.files[5].read_bytes()
    inputs = Arrays(
        index=np.array([b"photos"], object),
        text=np.array([b"1", b"2"], object),
        image=np.array([image], object),
        id=np.array([b"03.png", b"04.png"], object),
        weight=np.array([1, -0.5, 0.25, 2, 0], np.float32),
        top_k=np.array([7], np.int32),
        offset=np.array([2], np.int32),
        min_score=np.array([-0.5], np.float32),
    )
    request = TASKS["retrieve"].read(inputs)
    query = Query([b"1", b"2"], [image], [b"03.png", b"04.png"], [1, -0.5, 0.25, 2, 0])
    assert request == RetrieveRequest(
        b"photos",
        query,
        top_k=7,
        thumbnails=True,
        offset=2,
        min_score=-0.5,
        cancelled=inputs.cancelled,
    )
    outputs = TASKS["retrieve"].outputs(world.retrieve(request))
    assert list(outputs["id"]) == world.find(query, top_k=7, offset=2, min_score=-0.5)[0]
    assert outputs["index_version"].tolist() == [world.retrieve.index("photos").generation]


def test_an_image_that_is_none_is_refused_with_its_code(world: World) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    with pytest.raises(TaskError, match=r"^\[invalid_image\]"):
        world.find(Query(images=[file.getvalue(), b"no image"]))
