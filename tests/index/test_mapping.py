"""An index is mapped to another image tower, says so with its recall, and is embedded again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray

from radapter_serve.contract.errors import INDEX_MISMATCH, TaskError
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import add, build, build_from_embeddings
from radapter_serve.index.folder import FolderIndex
from radapter_serve.index.index import current
from radapter_serve.index.mapping import fit, held_out_recall, map_index
from radapter_serve.release.release import Tower
from radapter_serve.tasks.retrieve import Query, RetrieveRequest
from radapter_serve.tasks.table import TASKS
from tests.helpers.projection import DIM, Projection, Searching, projecting
from tests.helpers.small_release import photos_in, png

COUNT = 130
NEWER = Tower("sha256:newer", None)


class Turned(Projection):
    """Another image tower: the embeddings of the first one, in other axes, and with noise."""

    def __init__(self, texts: NDArray[np.float32], noise: float) -> None:
        super().__init__(texts)
        self._axes = np.linalg.qr(np.random.default_rng(3).standard_normal((DIM, DIM)))[0]
        self._noise = noise

    def images(self, pixels: NDArray[np.uint8], alpha: Any = None) -> NDArray[np.float32]:
        turned = super().images(pixels) @ self._axes
        for row, image in zip(turned, pixels, strict=True):  # the same noise in any batch
            draw = np.random.default_rng(int(image.astype(np.int64).sum()))
            row += self._noise * draw.standard_normal(len(row))
        return np.asarray(turned / np.linalg.norm(turned, axis=1, keepdims=True), np.float32)

    patches = images


def newer(indexes: Path = Path("indexes"), noise: float = 0.0) -> LoadedRelease:
    loaded = projecting(indexes, image_tower=NEWER, version=2)
    loaded.encoder = Turned(loaded.embed_texts([str(n) for n in range(9)]), noise)
    return loaded


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in `photos`, with the index of an older release in `indexes/photos`."""
    folder = tmp_path_factory.mktemp("mapping")
    photos_in(folder / "photos", COUNT, 8, 8)
    build(str(folder / "photos"), folder / "indexes" / "photos", projecting())
    return folder


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    """A copy of that index; its photos are shared."""
    shutil.copytree(folder / "indexes", tmp_path / "indexes")
    return tmp_path / "indexes" / "photos"


def test_one_tower_in_other_axes_is_found_as_procrustes_finds_it() -> None:
    draw = np.random.default_rng(0)
    old = unit(draw.standard_normal((300, 12)) + 1)
    axes = np.linalg.qr(draw.standard_normal((12, 12)))[0]
    new = unit(old @ axes + 0.02 * draw.standard_normal(old.shape))
    reference, _ = scipy.linalg.orthogonal_procrustes(old - old.mean(0), new - new.mean(0))
    expected = unit((old - old.mean(0)) @ reference + new.mean(0))
    assert (fit(old, new)(old) * expected).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("width", [6, 20])
def test_a_linear_tower_of_any_width_is_found_as_least_squares_finds_it(width: int) -> None:
    draw = np.random.default_rng(0)
    old = unit(draw.standard_normal((400, 12)))
    new = old @ draw.standard_normal((12, width)) + 0.01 * draw.standard_normal((400, width)) + 1
    new = unit(new)
    design = np.hstack([old, np.ones((400, 1))])
    expected = unit(design @ np.linalg.lstsq(design, new, rcond=None)[0])
    assert (fit(old, new)(old) * expected).sum(axis=1).min() > 0.995


def test_the_recall_is_of_images_that_the_fit_did_not_see() -> None:
    draw = np.random.default_rng(0)
    old, new = (unit(draw.standard_normal((100, 64))) for _ in range(2))
    in_sample = fit(old, new)(old)  # fits noise
    assert (in_sample * new).sum(axis=1).mean() > 0.5
    assert max(held_out_recall(old, new, new[:50])) < 0.25  # a tenth by chance


def test_the_recall_counts_the_ten_nearest_as_a_search_of_all_does() -> None:
    draw = np.random.default_rng(1)
    old = unit(draw.standard_normal((150, 8)))
    new = unit(old[:, ::-1] + 0.3 * draw.standard_normal(old.shape))
    texts = unit(draw.standard_normal((20, 8)))
    mapped = np.zeros_like(new)
    for number in range(150):
        fitted = np.arange(150) % 5 != number % 5
        mapped[number] = fit(old[fitted], new[fitted])(old[number : number + 1])[0]
    shares = []
    for query in range(150):
        others = np.array([row for row in range(150) if row != query])
        nearest = others[np.argsort(-new[others] @ new[query])[:10]]
        answer = others[np.argsort(-mapped[others] @ new[query])[:10]]
        shares.append(len({*nearest} & {*answer}) / 10)
    by_text = [
        len({*np.argsort(-new @ text)[:10]} & {*np.argsort(-mapped @ text)[:10]}) / 10
        for text in texts
    ]
    assert held_out_recall(old, new, texts) == pytest.approx((np.mean(shares), np.mean(by_text)))


def test_a_mapped_index_is_searched_as_one_of_the_new_tower_and_says_its_recall(
    folder: Path, out: Path
) -> None:
    search = Searching.of(newer(out.parent))
    with pytest.raises(TaskError) as error:
        search(RetrieveRequest("photos", Query(["1"])))
    assert error.value.code == INDEX_MISMATCH
    before = FolderIndex(out)
    mapped = map_index(out, newer())
    assert (mapped.sample, mapped.release) == (COUNT, before.facts.plan.release)
    assert mapped.recall == min(mapped.by_image, mapped.by_text) > 0.99

    # The embeddings are those of the new tower; the columns and the pictures stay.
    build(str(folder / "photos"), out.with_name("exact"), newer())
    exact, index = FolderIndex(out.with_name("exact")), FolderIndex(out, complete=True)
    np.testing.assert_allclose(index.vectors, exact.vectors, atol=1e-4)
    names = index.schema.names
    assert index.table(names) == before.table(names) == exact.table(names)
    assert index.facts.plan.release == exact.facts.plan.release
    answer = search.answered(RetrieveRequest("photos", Query(["1"])))
    exactly = search.answered(RetrieveRequest("exact", Query(["1"])))
    assert [hit.id for hit in answer.answer.hits] == [hit.id for hit in exactly.answer.hits]

    # The receipt of an answer has the recall.
    for each, recall in ((answer, f'"mapped": {round(mapped.recall, 4)}'), (exactly, None)):
        values = TASKS["retrieve"].values(2, [each])
        assert (recall in str(values.plain["receipt"])) if recall else each.mapped is None


def test_a_build_embeds_a_mapped_index_in_parts(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.index.writer.BATCH", 50)
    map_index(out, newer(noise=0.01))
    mapped = current(out)

    def stop(done: int, total: int) -> None:
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="so far are kept"):
        build(str(folder / "photos"), out, newer(noise=0.01), progress=stop)
    assert current(out) == mapped  # searched until all images are embedded
    summary = build(str(folder / "photos"), out, newer(noise=0.01))
    assert (summary.embedded, summary.kept) == (COUNT - 100, 100)
    facts = current(out)[1]
    assert facts.mapped is None
    assert not build(str(folder / "photos"), out, newer(noise=0.01)).changed


def test_an_addition_embeds_new_images_and_the_index_stays_mapped(
    out: Path, tmp_path: Path
) -> None:
    shutil.copytree(current(out)[1].plan.root, tmp_path / "more")
    build(str(tmp_path / "more"), out, projecting(), resume=False)
    map_index(out, newer(noise=0.01))
    (tmp_path / "more" / "late.png").write_bytes(png(1000))
    shutil.copy(tmp_path / "more" / "3.png", tmp_path / "more" / "copy.png")
    assert add(out, newer(noise=0.01)).embedded == 2  # no mapped embedding is taken for a copy
    index = FolderIndex(out)
    assert index.facts.mapped is not None
    loaded = newer()
    names = ["late.png", "copy.png"]
    pixels = [loaded.pixels((tmp_path / "more" / name).read_bytes()) for name in names]
    exact = newer(noise=0.01).embed_pixels(pixels)
    np.testing.assert_allclose(index.embeddings(names), exact, atol=1e-6)


def test_mapping_keeps_a_stopped_build(folder: Path, out: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(str(folder / "photos"), out, newer(), progress=stop)
    map_index(out, newer())
    assert build(str(folder / "photos"), out, newer()).embedded == 0


def test_what_can_not_be_mapped_is_refused_and_the_index_stays(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    def assert_refused(message: str, loaded: LoadedRelease, **options: Any) -> None:
        before = current(out)
        with pytest.raises(RAdapterError, match=message):
            map_index(out, loaded, **options)
        assert current(out) == before and not list(out.parent.glob(".*"))

    assert_refused("--min-recall is nan", newer(), min_recall=float("nan"))
    assert_refused("is of this release's image tower", projecting())
    assert_refused(
        r"finds .*% .* with texts, .*min-recall is 0.8; .*130 images.*-index build", newer(noise=9)
    )
    with pytest.raises(RAdapterError, match="no index at"):
        map_index(tmp_path / "none", newer())

    # Files that changed since the build, and copies, are no pairs.
    shutil.copytree(folder / "photos", tmp_path / "changing")
    shutil.copy(tmp_path / "changing" / "128.png", tmp_path / "changing" / "129.png")
    build(str(tmp_path / "changing"), out, projecting(), resume=False)
    (tmp_path / "changing" / "0.png").unlink()
    for number in range(1, 40):
        (tmp_path / "changing" / f"{number}.png").write_bytes(png(500 + number))
    assert_refused("of 130 images .* 89 can be read.*a map needs 100; build", newer())

    vectors = tmp_path / "vectors.npy"
    np.save(vectors, FolderIndex(out).vectors)
    (tmp_path / "rows.csv").write_text("image\n" + "".join(f"{n}.png\n" for n in range(COUNT)))
    build_from_embeddings(vectors, tmp_path / "rows.csv", out, projecting())
    assert_refused("made of embeddings, without images", newer())
