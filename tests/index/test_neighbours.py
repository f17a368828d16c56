"""Search in many images, where FAISS names candidates: against numpy, and with files that are
damaged or exchanged.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyarrow import parquet

from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index.build import add, build
from radapter_serve.index.index import Index, open_index
from radapter_serve.index.mapped import ROWS, VECTORS
from radapter_serve.index.met import Met
from radapter_serve.index.neighbours import CODES, Neighbours, write_neighbours
from radapter_serve.index.recall import tune
from radapter_serve.index.verify import verify
from radapter_serve.index.writer import Sizes
from tests.helpers.indexes import opened, said, say, searched
from tests.index.test_index import FakeRelease, Projection

COUNT = 3000
DIM = 32
FEW = 200
SMALL = Sizes(exact=FEW)


class Ready(FakeRelease):
    """Takes an image file as the number of its vector."""

    def __init__(self, vectors: NDArray[np.float32], texts: NDArray[np.float32]) -> None:
        super().__init__()
        self.vectors = vectors
        self.texts = texts
        self.release = dataclasses.replace(self.release, embed_dim=vectors.shape[1])

    def pixels(self, data: bytes) -> Any:
        return int(data)

    def embed_pixels(self, pixels: Sequence[Any]) -> NDArray[np.float32]:
        assert isinstance(self.encoder, Projection)
        self.encoder.embedded += len(pixels)
        return self.vectors[list(pixels)]

    def embed_texts(self, _: Sequence[str]) -> NDArray[np.float32]:
        return self.texts


def clustered(
    count: int, dim: int, centres: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors in clusters, and texts, which lie to one side of them all."""
    random = np.random.default_rng(0)
    middle = random.standard_normal((centres, dim))
    drawn = middle[random.integers(centres, size=count)] + 0.7 * random.standard_normal(
        (count, dim)
    )
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    texts = drawn[-200:] + 1.5 * np.eye(dim)[0]
    return drawn.astype(np.float32), (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(
        np.float32
    )


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, np.float32)


def write_numbers(folder: Path, numbers: Sequence[int]) -> None:
    """Write what is not there yet."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        file = folder / f"{number:06}.jpg"
        if not file.exists():
            file.write_text(str(number))


def found(
    index: Index, query: NDArray[np.float32], top_k: int = 10, where: str | None = None
) -> list[int]:
    return [int(hit.id[:6]) for hit in index.search(query, top_k, where)]


def recall(
    index: Index,
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    where: str | None = None,
) -> float:
    """Recall@10 against numpy's own order of the vectors that meet the condition."""
    hits = [
        len(set(np.argsort(-(vectors @ query))[:10]) & set(found(index, query, where=where)))
        for query in queries
    ]
    return sum(hits) / (10 * len(hits))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ready]:
    """An index of 3,000 vectors whose approximate search begins at 200, and what embedded it."""
    folder = tmp_path_factory.mktemp("neighbours")
    vectors, texts = clustered(COUNT + 400, DIM, 60)
    write_numbers(folder / "photos", range(COUNT))
    release = Ready(vectors, texts[:100])
    summary = build(str(folder / "photos"), folder / "index", release, sizes=SMALL)
    assert summary.recall is not None and summary.recall >= 0.97
    return folder, release


@pytest.fixture
def copied(built: tuple[Path, Ready], tmp_path: Path) -> tuple[Path, Ready]:
    """A copy of the index, to be changed."""
    shutil.copytree(built[0] / "index", tmp_path / "index")
    return tmp_path / "index", built[1]


@pytest.mark.parametrize("where", [None, "path < '002000.jpg'", "path < '000150.jpg'"])
def test_pages_put_together_are_one_large_page(
    built: tuple[Path, Ready], where: str | None
) -> None:
    index = opened(built[0] / "index", few=FEW)
    query = built[1].texts[3]
    whole = index.search(query, 100, where, offset=0)
    pages = [index.search(query, 10, where, offset=offset) for offset in range(0, 100, 10)]
    assert [hit for page in pages for hit in page] == whole
    assert len(whole) == 100
    rest = index.search(query, 1000, where, offset=100)
    assert [*whole, *rest] == index.search(query, 1000, where, offset=0)


def test_images_and_texts_are_found_with_their_own_scores(built: tuple[Path, Ready]) -> None:
    folder, release = built
    index = open_index(folder / "index")
    vectors = release.vectors[:COUNT]
    assert index.facts.nearest is not None
    for queries in (release.vectors[COUNT : COUNT + 100], clustered(COUNT + 400, DIM, 60)[1][100:]):
        assert recall(index, queries, vectors) >= 0.95
    query = vectors[7]
    hits = index.search(query, 10)
    numbers = [int(hit.id[:6]) for hit in hits]
    np.testing.assert_allclose([hit.score for hit in hits], vectors[numbers] @ query, atol=1e-6)
    assert numbers[0] == 7 and hits[0].metadata.keys() == set(index.facts.columns)
    assert len(index.search(query, 1000)) == 1000 and len(set(found(index, query, 1000))) == 1000


def test_few_rows_are_compared_exactly_and_many_keep_the_recall(built: tuple[Path, Ready]) -> None:
    folder, release = built
    index = opened(folder / "index", few=FEW)
    vectors = release.vectors[:COUNT]
    queries = release.vectors[COUNT : COUNT + 50]
    for query in queries[:10]:
        assert found(index, query, 10, "path < '000150.jpg'") == list(
            np.argsort(-(vectors[:150] @ query))[:10]
        )
    assert index.search(queries[0], 10, "width > 5") == []
    for share in (300, 1500, 2999):
        assert recall(index, queries, vectors[:share], f"path < '{share:06}.jpg'") >= 0.95


def test_additions_and_removals_are_found(
    copied: tuple[Path, Ready], built: tuple[Path, Ready]
) -> None:
    out, release = copied
    photos = built[0] / "photos"
    before = release.embedded
    elsewhere = open_index(out)
    cells = said(out)["nearest"]["trained_on"]
    (photos / "000000.jpg").unlink()
    write_numbers(photos, range(COUNT, COUNT + 5))
    try:
        summary = add(out, release, prune=True, sizes=SMALL)
        assert (summary.count, summary.removed, release.embedded - before) == (COUNT + 4, 1, 5)
        index = open_index(out)
        assert found(index, release.vectors[COUNT + 3], 1) == [COUNT + 3] and 0 not in found(
            index, release.vectors[0], 10
        )
        assert (
            recall(index, release.vectors[COUNT + 5 : COUNT + 50], release.vectors[: COUNT + 5])
            >= 0.95
        )
        assert (
            index.facts.nearest is not None and index.facts.nearest.trained_on == cells
        )  # the same cells
        assert found(elsewhere, release.vectors[0], 1) == [
            0
        ]  # who has it open goes on with what it was
        assert add(out, release, sizes=SMALL).changed is False
        assert len(list(out.glob("g-*"))) == 2  # the old one, for an hour
        for path in out.glob("g-*"):
            os.utime(path, (0, 0))
        write_numbers(photos, [COUNT + 5])
        add(out, release, sizes=SMALL)
        assert len(list(out.glob("g-*"))) == 2 and len(open_index(out)) == COUNT + 5
    finally:
        for number in range(COUNT, COUNT + 6):
            (photos / f"{number:06}.jpg").unlink(missing_ok=True)
        write_numbers(photos, [0])


@pytest.mark.parametrize(
    ("name", "harm"), [(CODES, "flipped"), (VECTORS, "cut"), (ROWS, "gone"), (ROWS, "flipped")]
)
def test_a_damaged_file_is_refused_in_one_line_and_mended(
    name: str, harm: str, copied: tuple[Path, Ready]
) -> None:
    out, release = copied
    path = searched(out) / name
    before = release.embedded
    data = bytearray(path.read_bytes())
    path.unlink()
    if harm == "cut":
        path.write_bytes(data[:-10])
    elif harm == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(
        RAdapterError,
        match=rf"{name} in search is not as it was written; mend it: radapter-index add",
    ) as why:
        open_index(out)
    assert "\n" not in str(why.value)
    assert add(out, release, sizes=SMALL).changed and release.embedded == before
    assert verify(out).ok and found(open_index(out), release.vectors[5], 1) == [5]


def rename(out: Path, name: str) -> None:
    """Have `index.json` name a file as it is now."""
    facts = said(out)
    path = searched(out) / name
    facts["searched"][name] = {"size": path.stat().st_size, "digest": digest_of(path)}
    say(out, facts)


@pytest.mark.parametrize(
    "what", ["another kind", "another width", "noise", "cut", "pickle", "float16", "fewer", "rows"]
)
def test_a_file_that_index_json_names_but_that_does_not_fit_is_refused(
    what: str, copied: tuple[Path, Ready]
) -> None:
    import faiss

    out, release = copied
    folder = searched(out)
    codes = searched(out) / CODES
    if what == "another kind":
        flat = faiss.IndexFlatIP(DIM)
        flat.add(release.vectors[:COUNT])
        faiss.write_index(flat, str(codes))
    elif what == "another width":
        other = faiss.index_factory(16, "IVF4,PQ8x4fs", faiss.METRIC_INNER_PRODUCT)
        some = np.ascontiguousarray(release.vectors[:COUNT, :16])
        other.train(some)
        other.add(some)
        faiss.write_index(other, str(codes))
    elif what == "noise":
        codes.write_bytes(np.random.default_rng(0).bytes(5000))
    elif what == "cut":
        codes.write_bytes(codes.read_bytes()[:20_000])
    elif what == "pickle":
        np.save(folder / VECTORS, np.array([{}] * COUNT, object))
    elif what == "float16":
        np.save(folder / VECTORS, release.vectors[:COUNT].astype(np.float16))
    elif what == "fewer":
        np.save(folder / VECTORS, release.vectors[: COUNT - 1])
    elif what == "rows":
        (folder / ROWS).write_bytes(np.random.default_rng(0).bytes(5000))
    for name in (CODES, ROWS, VECTORS):
        rename(out, name)
    with pytest.raises(RAdapterError, match="can't be searched.*radapter-index add") as why:
        open_index(out)
    assert "\n" not in str(why.value)


def test_a_full_disk_is_one_line_and_what_is_searched_stays(
    copied: tuple[Path, Ready], built: tuple[Path, Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    out, release = copied
    write_numbers(built[0] / "photos", [COUNT])
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                faiss,
                "write_index",
                lambda *_: (_ for _ in ()).throw(RuntimeError("No space left on device")),
            )
            with pytest.raises(
                RAdapterError, match="cannot write .*search.*: No space left on device"
            ):
                add(out, release, sizes=SMALL)
        assert len(open_index(out)) == COUNT and len(list(out.glob("g-*"))) == 1
        assert add(out, release, sizes=SMALL).count == COUNT + 1
        assert found(open_index(out), release.vectors[COUNT], 1) == [COUNT]
    finally:
        (built[0] / "photos" / f"{COUNT:06}.jpg").unlink()


def test_a_build_that_is_given_again_mends_and_embeds_nothing(
    copied: tuple[Path, Ready], built: Any
) -> None:
    out, release = copied
    (searched(out) / CODES).unlink()
    before = release.embedded
    summary = build(str(built[0] / "photos"), out, release, sizes=SMALL)
    assert summary.kept == COUNT and release.embedded == before
    assert found(open_index(out), release.vectors[5], 1) == [5]


def test_few_rows_are_compared_without_faiss(
    built: tuple[Path, Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 900 rows that meet a condition; one more, and FAISS is asked."""
    folder, release = built
    index = opened(folder / "index", few=900)
    query = release.vectors[COUNT]
    monkeypatch.setattr(Neighbours, "_named", lambda *_: pytest.fail("FAISS was asked"))
    assert found(index, query, 10, "path < '000900.jpg'") == list(
        np.argsort(-(release.vectors[:900] @ query))[:10]
    )
    with pytest.raises(pytest.fail.Exception, match="FAISS was asked"):
        index.search(query, 10, "path < '000901.jpg'")


@pytest.fixture(scope="module")
def many(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Neighbours, NDArray[np.float32], NDArray[np.float32]]:
    """20,000 vectors, and queries."""
    count = 20_000
    dim = 64
    folder = tmp_path_factory.mktemp("many")
    vectors, texts = clustered(count + 20, dim, 200)
    queries = np.concatenate([vectors[count:], texts[-10:]])
    vectors = vectors[:count]
    write_neighbours(folder, vectors)
    return Neighbours(folder, vectors), vectors, queries


def test_few_vectors_have_a_cell_for_each_32_and_more_have_twice_their_root(
    built: tuple[Path, Ready], many: tuple[Neighbours, Any, Any]
) -> None:
    assert said(built[0] / "index")["nearest"]["cells"] == 3000 // 32
    assert many[0].cells == 282  # 20,000 // 32 is more


def test_cells_are_kept_until_an_index_is_more_than_twice_as_large(tmp_path: Path) -> None:
    """An index that starts with too few images for cells."""
    photos = tmp_path / "photos"
    out = tmp_path / "index"
    vectors, texts = clustered(301, 16, 5)
    release = Ready(vectors, texts[:20])
    for count, trained_on in ((100, None), (150, 150), (300, 150), (301, 301)):
        write_numbers(photos, range(count))
        build(str(photos), out, release, sizes=Sizes(exact=100))
        index = open_index(out)
        nearest = index.facts.nearest
        assert (nearest.trained_on if nearest else None) == trained_on
        assert found(index, vectors[count - 1], 1) == [count - 1]


@pytest.mark.parametrize("how", ["float64", "strided"])
def test_a_query_in_another_layout_is_the_same_query(
    how: str, many: tuple[Neighbours, NDArray[np.float32], NDArray[np.float32]]
) -> None:
    near, vectors, queries = many
    query = np.repeat(queries[0], 2)[::2] if how == "strided" else queries[0].astype(np.float64)
    scores = vectors[::7] @ queries[0]
    found, cosines = near.best(query, np.arange(0, len(vectors), 7), 10)
    assert found.tolist() == (7 * np.argsort(-scores)[:10]).tolist()
    np.testing.assert_allclose(cosines, np.sort(scores)[::-1][:10], atol=1e-6)


def test_more_hits_than_the_cells_hold_are_found_in_others(
    many: tuple[Neighbours, Any, Any],
) -> None:
    near, vectors, queries = many
    found, scores = near.nearest(queries[0], 5000, 1, 1)
    assert len(set(found.tolist())) == len(found) >= 5000 and (np.diff(scores) <= 0).all()
    alone = near.nearest(vectors[3], 1, 1, 1)[0]
    assert alone[0] == 3


@pytest.mark.parametrize(
    "kept",
    [
        *(f"share {share}" for share in (0.9, 0.5, 0.1, 0.03, 0.005)),
        *(f"beyond {share}" for share in (0.02, 0.1, 0.3, 0.5, 0.8)),
        "nearest half",
    ],
)
def test_the_recall_holds_under_any_condition(kept: str, many: tuple[Neighbours, Any, Any]) -> None:
    """A share of all, drawn; what is beyond the nearest share of all, in whatever order; the
    nearest half.
    """
    near, vectors, queries = many
    effort = tune(near, queries[-10:], queries=20)
    random = np.random.default_rng(3)
    hits = 0
    for query in queries:
        order = np.argsort(-(vectors @ query))
        name, _, number = kept.rpartition(" ")
        if name == "share":
            order = order[random.random(len(order)) < float(number)]
        elif name == "beyond":
            order = order[int(float(number) * len(order)) :]
        else:
            order = order[: len(order) // 2]
        marks = np.zeros(len(vectors), bool)
        marks[order] = True
        found, _ = near.nearest_of(
            query, 10, int(effort["nprobes"]), int(effort["candidates"]), Met(marks)
        )
        hits += len(set(order[:10]) & set(found[:10]))
    assert hits / (10 * len(queries)) >= 0.97


@pytest.mark.parametrize(("share", "cells"), [(1, 32), (0.5, 39), (0.1, 64), (0.02, 176)])
def test_the_fewer_meet_a_condition_the_more_cells_are_visited_and_no_more_than_it_takes(
    share: float, cells: int, many: tuple[Neighbours, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search takes as long as it reads cells, of which there are 282."""
    near, vectors, queries = many
    visited = []
    named = Neighbours._named

    def counted(self: Neighbours, query: Any, wanted: int, probes: int, among: Any) -> Any:
        visited.append(probes)
        return named(self, query, wanted, probes, among)

    monkeypatch.setattr(Neighbours, "_named", counted)
    marks = np.zeros(len(vectors), bool)
    marks[:: round(1 / share)] = True
    near.nearest(queries[0], 10, 32, 200, Met(marks))
    assert visited[0] == cells


def test_a_condition_is_answered_rightly_where_the_codes_see_all_it_leaves_too_low(
    tmp_path: Path,
) -> None:
    """Cells are kept when images of another kind are added. Here the codes say of all of these that
    they lie 0.17 farther from the query than they do, and what is nearest to it meets no condition.
    """
    random = np.random.default_rng(0)
    count = 3000
    towards = np.eye(DIM, dtype=np.float32)
    places = towards[random.integers(8, size=count)]
    old = unit(places + 0.05 * random.standard_normal((count, DIM)))
    others = places[places[:, 0] == 0][:1500]
    lean = random.uniform(0.2, 0.4, (len(others), 1)) * towards[0]
    new = unit(others + lean + 0.05 * random.standard_normal(others.shape))
    (tmp_path / "old").mkdir()
    made = write_neighbours(tmp_path / "old", old)
    vectors = np.concatenate([old, new])
    write_neighbours(tmp_path, vectors, tmp_path / "old", made)
    near = Neighbours(tmp_path, vectors)
    found, cosines = near.nearest_of(towards[0], 10, 8, 100, Met(np.arange(len(vectors)) >= count))
    best = np.argsort(-new[:, 0])[:10]
    assert found.tolist() == (count + best).tolist()
    np.testing.assert_allclose(cosines, new[best, 0], atol=1e-6)


def test_all_that_rounding_lets_no_one_tell_from_the_last_are_given(tmp_path: Path) -> None:
    """Of 600 vectors 200 have the same cosine with the query, in other directions each; float32
    gives them different ones, and by another sum in another order.
    """
    random = np.random.default_rng(0)
    query = np.eye(DIM)[0]
    aside = random.standard_normal((600, DIM))
    aside[:, 0] = 0
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    level = np.where(np.arange(600) % 3 == 0, 0.6, 0.5)[:, None]
    turn = np.linalg.qr(random.standard_normal((DIM, DIM)))[0]
    vectors = ((level * query + (1 - level**2) ** 0.5 * aside) @ turn).astype(np.float32)
    asked = (query @ turn).astype(np.float32)
    write_neighbours(tmp_path, vectors)
    near = Neighbours(tmp_path, vectors)
    equal = list(range(0, 600, 3))
    assert len(set((vectors[equal] @ asked).tolist())) > 1
    for found, _ in (
        near.best(asked, np.arange(600), 10),
        near.nearest(asked, 10, near.cells, 600),
        near.nearest_of(asked, 10, near.cells, 600, Met(np.ones(600, bool))),
    ):
        assert sorted(found.tolist()) == equal


def test_a_condition_on_metadata(tmp_path: Path, built: tuple[Path, Ready]) -> None:
    folder, release = built
    years = np.arange(COUNT) % 5
    names = [f"{folder}/photos/{number:06}.jpg" for number in range(COUNT)]
    parquet.write_table(pa.table({"image": names, "year": years}), tmp_path / "table.parquet")
    build(f"parquet:{tmp_path / 'table.parquet'}", tmp_path / "index", release, sizes=SMALL)
    query = release.vectors[COUNT]
    hits = opened(tmp_path / "index", few=FEW).search(query, 10, "year = 3")
    scores = np.where(years == 3, release.vectors[:COUNT] @ query, -1)
    assert {hit.metadata["year"] for hit in hits} == {3}
    assert len({int(Path(hit.id).stem) for hit in hits} & set(np.argsort(-scores)[:10])) >= 9


@pytest.mark.slow
def test_an_approximate_index_keeps_its_promise(tmp_path: Path) -> None:
    """120,000 clustered vectors; queries near them and, as texts are, all to one side: recall@10
    against numpy.
    """
    count = 120_000
    vectors, texts = clustered(count + 200, 64, 500)
    vectors, queries = vectors[:count], vectors[count:]
    release = Ready(vectors, texts[:100])
    write_numbers(tmp_path / "photos", range(count))
    sizes = Sizes(batch=10_000)
    summary = build(str(tmp_path / "photos"), tmp_path / "index", release, sizes=sizes)
    assert summary.recall is not None and summary.recall >= 0.97
    index = open_index(tmp_path / "index")
    for asked in (queries, texts[100:]):
        assert recall(index, asked, vectors) >= 0.95
    few = found(index, queries[0], 10, "path < '000050.jpg'")  # every one of them is compared
    assert few == list(np.argsort(-(vectors[:50] @ queries[0]))[:10])
    assert recall(index, queries, vectors[:60_000], "path < '060000.jpg'") >= 0.95
