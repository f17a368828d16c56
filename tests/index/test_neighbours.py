"""Search in many images, where FAISS names candidates: against numpy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyarrow import parquet

from radapter_serve.contract.errors import TaskError
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index import folder, neighbours, writer
from radapter_serve.index.build import add, build, build_from_embeddings
from radapter_serve.index.conditions import Met
from radapter_serve.index.facts import Index
from radapter_serve.index.folder import ROWS, VECTORS
from radapter_serve.index.index import open_index
from radapter_serve.index.neighbours import CODES, Neighbours, tune, write_neighbours
from tests.helpers.indexes import generation, index_facts, write_index_facts
from tests.helpers.projection import embeds_of, projecting
from tests.index.test_index import embedded, write

COUNT = 3000
DIM = 32
FEW = 200
Array = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def small_is_approximate() -> Iterator[None]:
    """Search more than 200 images by codes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "EXACT", FEW)
        yield


def unit(vectors: NDArray[Any]) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def clustered(count: int, dim: int, centres: int) -> tuple[Array, Array]:
    """Vectors in clusters, and texts, which lie to one side of them all."""
    random = np.random.default_rng(0)
    middle = random.standard_normal((centres, dim))
    spread = 0.7 * random.standard_normal((count, dim))
    drawn = unit(middle[random.integers(centres, size=count)] + spread)
    return drawn, unit(drawn[-200:] + 1.5 * np.eye(dim)[0])


def make(folder: Path, vectors: Array, texts: Array) -> Path:
    """An index of vectors whose ids are their numbers, with a year of five."""
    numbers = np.arange(len(vectors))
    names = [f"{number:06}.jpg" for number in numbers]
    np.save(folder / "vectors.npy", vectors)
    rows = pa.table({"image": names, "year": numbers % 5})
    parquet.write_table(rows, folder / "rows.parquet")
    loaded = projecting(embed_dim=vectors.shape[1])
    loaded.embed_texts = lambda _: texts  # type: ignore[method-assign,assignment]
    files = folder / "vectors.npy", folder / "rows.parquet"
    summary = build_from_embeddings(*files, folder / "index", loaded)
    assert summary.recall is not None and summary.recall >= 0.975
    return folder / "index"


def numbers_of(index: Index, query: Array, top_k: int = 10, where: str | None = None) -> list[int]:
    return [int(hit.id[:6]) for hit in index.search(query, top_k, where)]


class Corpus(NamedTuple):
    """An index of 3,000 vectors whose approximate search begins at 200, and queries."""

    out: Path
    vectors: Array
    images: Array
    texts: Array


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    vectors, texts = clustered(COUNT + 400, DIM, 60)
    out = make(tmp_path_factory.mktemp("neighbours"), vectors[:COUNT], texts[:100])
    return Corpus(out, vectors[:COUNT], vectors[COUNT:], texts[100:])


def test_images_and_texts_are_found_with_their_own_scores(corpus: Corpus) -> None:
    index = open_index(corpus.out)
    for queries in (corpus.images[:50], corpus.texts[:50]):
        hits_in_common = 0
        for query in queries:
            best = np.argsort(-(corpus.vectors @ query))[:10]
            hits_in_common += len(set(best) & set(numbers_of(index, query)))
        assert hits_in_common / (10 * len(queries)) >= 0.96
    query = corpus.vectors[7]
    hits = index.search(query, 10)
    numbers = [int(hit.id[:6]) for hit in hits]
    np.testing.assert_allclose(
        [hit.score for hit in hits], corpus.vectors[numbers] @ query, atol=1e-6
    )
    assert numbers[0] == 7 and hits[0].metadata["year"] == 2
    assert len(set(numbers_of(index, query, 1000))) == 1000


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare each image that meets a condition if there are 200 or fewer."""
    monkeypatch.setattr(folder, "FEW", FEW)


@pytest.mark.parametrize("where", [None, "path < '002000.jpg'", "path < '000150.jpg'"])
def test_pages_put_together_are_one_large_page(
    corpus: Corpus, few: None, where: str | None
) -> None:
    index = open_index(corpus.out)
    query = corpus.texts[3]
    large_page = index.search(query, 100, where, offset=0)
    pages = [index.search(query, 25, where, offset=offset) for offset in range(0, 100, 25)]
    assert [hit for page in pages for hit in page] == large_page and len(large_page) == 100
    rest = index.search(query, 1000, where, offset=100)
    assert [*large_page, *rest] == index.search(query, 1000, where, offset=0)


def test_few_rows_are_compared_exactly(
    corpus: Corpus, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(corpus.out)
    query = corpus.images[0]
    in_doubles = index.search(query.astype(np.float64), 10, "path < '000150.jpg'")
    assert [hit.id for hit in in_doubles] == [
        hit.id for hit in index.search(query, 10, "path < '000150.jpg'")
    ]
    scores = np.where(np.arange(COUNT) % 5 == 3, corpus.vectors @ query, -1)
    assert set(numbers_of(index, query, 10, "year = 3")) == set(np.argsort(-scores)[:10])
    assert index.search(query, 10, "width > 5") == []
    monkeypatch.setattr(Neighbours, "nearest", lambda *_: pytest.fail("FAISS was asked"))
    best = np.argsort(-(corpus.vectors[:FEW] @ query))[:10]
    assert numbers_of(index, query, 10, f"path < '{FEW:06}.jpg'") == list(best)
    with pytest.raises(pytest.fail.Exception, match="FAISS was asked"):
        index.search(query, 10)
    # So is one in 64 of a large index.
    monkeypatch.setattr(folder, "FEW", 10)
    share = COUNT // 64
    best = np.argsort(-(corpus.vectors[:share] @ query))[:10]
    assert numbers_of(index, query, 10, f"path < '{share:06}.jpg'") == list(best)


def test_an_index_grows_beyond_what_is_compared_and_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    out = tmp_path / "index"
    release = projecting()
    monkeypatch.setattr(writer, "EXACT", 60)
    for count in (60, 120):
        for number in range(count - 60, count):
            write(photos / f"{number:06}.png", number)
        build(str(photos), out, release)
        index = open_index(out)
        assert (index.facts.nearest is not None) == (count > 60)
        newest = embeds_of([photos / f"{count - 1:06}.png"])[0]
        assert numbers_of(index, newest, 1) == [count - 1]
    first = photos / "000000.png"
    query = embeds_of([first])[0]
    first.unlink()
    summary = add(out, release, prune=True)
    assert (summary.count, summary.removed, summary.embedded) == (119, 1, 0)
    assert 0 not in numbers_of(open_index(out), query, 10)
    assert numbers_of(index, query, 1) == [0]  # a reader goes on with what it opened
    assert add(out, release).changed is False
    # Generations that were replaced an hour ago go.
    for path in out.glob("g-*"):
        os.utime(path, (0, 0))
    write(first, 0)
    add(out, release)
    assert len(list(out.glob("g-*"))) == 2 and embedded(release) == 121


def other_codes(dim: int, kind: str) -> Any:
    """FAISS's index of other vectors, or of another kind."""
    import faiss

    vectors, _ = clustered(COUNT, dim, 5)
    index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    return faiss.serialize_index(index).tobytes()


NOISE = np.random.default_rng(0).bytes(5000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (CODES, lambda: other_codes(DIM, "Flat")),
        (CODES, lambda: other_codes(8, "IVF4,PQ4x4fs")),
        (CODES, lambda: NOISE),
        (VECTORS, lambda: np.array([{}] * COUNT, object)),
        (VECTORS, lambda: np.ones((COUNT - 1, DIM), np.float32)),
        (ROWS, lambda: NOISE),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whatever_the_digests_say(
    name: str, content: Any, corpus: Corpus, tmp_path: Path
) -> None:
    out = shutil.copytree(corpus.out, tmp_path / "index")
    path = generation(out) / name
    harm = content()
    if isinstance(harm, bytes):
        path.write_bytes(harm)
    else:
        np.save(path, harm)
    facts = index_facts(out)
    facts["files"][name] = {"size": path.stat().st_size, "digest": digest_of(path)}
    write_index_facts(out, facts)
    with pytest.raises(RAdapterError, match="can't be used.*radapter-index build") as error:
        open_index(out)
    assert "\n" not in str(error.value)


def test_codes_that_can_not_be_written_leave_nothing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    full = Mock(side_effect=RuntimeError("No space left on device"))
    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(RAdapterError, match="cannot write .*: No space left on device"):
        make(tmp_path, corpus.vectors[:300], corpus.texts)
    assert not list(tmp_path.glob("*index*"))


def test_more_hits_than_the_cells_hold_are_found_in_others(corpus: Corpus) -> None:
    near = Neighbours(generation(corpus.out), corpus.vectors)
    positions, scores = near.nearest(corpus.images[0], 1000, 1, 1)
    assert len(set(positions.tolist())) == len(positions) >= 1000
    assert (np.diff(scores) <= 0).all()
    assert near.nearest(near.vectors[3], 1, 1, 1)[0][0] == 3


@pytest.mark.parametrize("condition", ["share 0.9", "share 0.005", "beyond 0.02", "beyond 0.8"])
def test_the_recall_holds_under_any_condition(condition: str, corpus: Corpus) -> None:
    """A share of all, drawn at random; or all beyond the nearest share."""
    near = Neighbours(generation(corpus.out), corpus.vectors)
    effort = open_index(corpus.out).facts.nearest
    assert effort is not None
    queries = [*corpus.images[:20], *corpus.texts[:10]]
    random = np.random.default_rng(3)
    name, number = condition.split()
    hits = 0
    for query in queries:
        order = np.argsort(-(near.vectors @ query))
        if name == "share":
            order = order[random.random(len(order)) < float(number)]
        else:
            order = order[int(float(number) * len(order)) :]
        marks = np.zeros(len(near.vectors), bool)
        marks[order] = True
        positions, _ = near.nearest(query, 10, effort.nprobes, effort.candidates, Met(marks))
        hits += len(set(order[:10]) & set(positions[:10]))
    assert hits / (10 * len(queries)) >= 0.97


def test_vectors_whose_cosines_differ_by_rounding_are_all_returned(tmp_path: Path) -> None:
    """Of 600 vectors 200 have the same cosine with the query, which float32 tells apart."""
    random = np.random.default_rng(0)
    query = np.eye(DIM)[0]
    aside = random.standard_normal((600, DIM))
    aside[:, 0] = 0
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    level = np.where(np.arange(600) % 3 == 0, 0.6, 0.5)[:, None]
    turn = np.linalg.qr(random.standard_normal((DIM, DIM)))[0]
    vectors = ((level * query + (1 - level**2) ** 0.5 * aside) @ turn).astype(np.float32)
    turned_query = (query @ turn).astype(np.float32)
    write_neighbours(tmp_path, vectors, lambda _: vectors[:1])
    near = Neighbours(tmp_path, vectors)
    with pytest.raises(TaskError, match="the caller gave up"):
        near.nearest(turned_query, 10, near.cells, 600, cancelled=lambda: True)
    equal = list(range(0, 600, 3))
    assert len(set((vectors[equal] @ turned_query).tolist())) > 1
    for among in (None, Met(np.ones(600, bool))):
        assert sorted(near.nearest(turned_query, 10, near.cells, 600, among)[0].tolist()) == equal
    # Copies of one vector, more than the candidates
    vectors[:400] = turned_query
    write_neighbours(tmp_path, vectors, lambda _: vectors[:1])
    near = Neighbours(tmp_path, vectors)
    assert sorted(near.nearest(turned_query, 10, near.cells, 10)[0].tolist()) == list(range(400))


class Exact(Neighbours):
    """Compares all vectors but one, and finds nothing for `bad` queries in less than 64 cells."""

    def __init__(self, vectors: Array, lost_row: int = -1, bad: Any = lambda query: False) -> None:
        self.vectors = vectors
        self.lost_row = lost_row
        self.bad = bad

    def nearest(
        self, query: Array, top_k: int, nprobes: int, candidates: int, *_: Any
    ) -> tuple[Any, Array]:
        scores = self.vectors @ query
        order = np.argsort(-scores)
        order = order[order != self.lost_row][20 if nprobes < 64 and self.bad(query) else 0 :]
        return order[:top_k], scores[order[:top_k]]


def test_recall_is_of_the_worse_kind_of_query_and_against_every_vector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    vectors, texts = (unit(random.standard_normal((count, 8))) for count in (300, 40))
    monkeypatch.setattr(neighbours, "_BLOCK", 100)
    pairs = vectors.copy()
    pairs[150:] = vectors[:150]  # equal ones are as good as each other
    for worse in (True, False):
        exact = Exact(pairs, bad=lambda q, worse=worse: (q == texts).all(1).any() == worse)
        assert tune(exact, texts) == (64, 400, 1.0)
    # One vector of three blocks is never found, which each text has among its ten nearest.
    monkeypatch.setattr(neighbours, "EFFORTS", [(1, 10)])
    for lost_row in (0, 99, 100, 299):
        texts = np.repeat(vectors[[lost_row]], 3, axis=0)
        assert tune(Exact(vectors, lost_row), texts)[2] == pytest.approx(0.9)
