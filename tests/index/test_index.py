"""An index: built, added to, verified and searched, against numpy and against what lies on disk."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from radapter_serve.contract.errors import INVALID_ARGUMENT, TaskError
from radapter_serve.contract.preprocess import decode
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import add, build
from radapter_serve.index.facts import FACTS, MadeBy, Plan, build_command
from radapter_serve.index.index import open_index
from radapter_serve.index.verify import verify
from radapter_serve.index.writer import Sizes
from radapter_serve.lock import lock
from tests.helpers.indexes import (
    generation,
    opened,
    said,
    say,
    search_little,
    write_facts,
)
from tests.helpers.small_models import release as release_facts

DIM = 16


class Projection:
    """An encoder that projects the mean colours of images at random; counts what it embeds."""

    def __init__(self) -> None:
        self.embedded = 0

    def images(self, pixels: NDArray[Any], alpha: Any = None) -> NDArray[np.float32]:
        self.embedded += len(pixels)
        embeds = pixels @ np.random.default_rng(0).standard_normal((48, DIM))
        return np.asarray(embeds / np.linalg.norm(embeds, axis=1, keepdims=True), np.float32)

    def patches(self, pixels: NDArray[Any], alpha: Any = None) -> NDArray[np.float32]:
        raise NotImplementedError

    def tokens(self, tokens: NDArray[Any], alpha: Any = None) -> NDArray[np.float32]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Words:
    """Texts as they are."""

    def encode(self, texts: Sequence[str]) -> list[Any]:
        return [[text] for text in texts]

    def batch(self, rows: Sequence[Any]) -> NDArray[np.int32]:
        raise NotImplementedError


class FakeRelease(LoadedRelease):
    """Embeds an image by its mean colours alone, and texts at random."""

    def __init__(self, alpha: float = 0.5, *, turns: bool = True) -> None:
        preprocess = {"size": 4, "exif_orientation": turns}
        facts = release_facts(embed_dim=DIM, alpha=alpha, preprocess=preprocess)
        origin = {"model_repository": "/models of mine"}
        super().__init__(facts, Projection(), Words(), origin=origin)

    @property
    def embedded(self) -> int:
        """How many images it has embedded, with all changed copies of it."""
        assert isinstance(self.encoder, Projection)
        return self.encoder.embedded

    def pixels(self, data: bytes) -> NDArray[Any]:
        image = decode(data, exif_orientation=self.preprocess.exif_orientation)
        return np.asarray(image.convert("RGB").resize((4, 4)), np.float32).ravel() / 255 - 0.5

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        embeds = np.random.default_rng(1).standard_normal((len(texts), self.release.embed_dim))
        return np.asarray(embeds / np.linalg.norm(embeds, axis=1, keepdims=True), np.float32)


@pytest.fixture
def release() -> FakeRelease:
    return FakeRelease()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images in folders, with names that need care."""
    folder = tmp_path / "photos"
    names = [
        "a.jpg",
        "it's.png",
        "Ünïcode 猫.webp",
        'quo"te.jpeg',
        *(f"deep/er/{n}.JPG" for n in range(8)),
    ]
    for number, name in enumerate(names):
        write(folder / name, number)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_text("no image")
    return folder


def write(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path, kind, quality=95)


def embeds_of(release: FakeRelease, files: Sequence[Path]) -> NDArray[np.float32]:
    return release.embed_pixels([release.pixels(file.read_bytes()) for file in files])


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_search_is_numpys_argsort(photos: Path, tmp_path: Path, release: FakeRelease) -> None:
    summary = build(str(photos), tmp_path / "index", release)
    assert (summary.count, summary.embedded, summary.broken) == (12, 12, {})
    files = sorted(
        path
        for path in photos.rglob("*")
        if path.suffix != ".txt" and path.is_file() and path.name[0] != "."
    )
    embeds = embeds_of(release, files)
    index = open_index(tmp_path / "index")
    for query in embeds_of(release, files)[:4] * 0.9 + 0.1:
        query /= np.linalg.norm(query)
        hits = index.search(query, 5)
        best = np.argsort(-(embeds @ query))[:5]
        assert [hit.id for hit in hits] == [files[n].relative_to(photos).as_posix() for n in best]
        np.testing.assert_allclose([hit.score for hit in hits], (embeds @ query)[best], atol=1e-6)
    assert len(index.search(embeds[0], 1000)) == len(index) == 12


def test_metadata_and_thumbnails(photos: Path, tmp_path: Path, release: FakeRelease) -> None:
    write(photos / "wide.png", 99, (600, 300))
    build(str(photos), tmp_path / "index", release, thumbnails=64)
    index = open_index(tmp_path / "index")
    query = embeds_of(release, [photos / "wide.png"])[0]
    (hit,) = index.search(query, 1, thumbnails=True)
    assert hit.metadata.keys() == {"path", "width", "height", "digest"} == set(index.facts.columns)
    assert (hit.metadata["path"], hit.metadata["width"], hit.metadata["height"]) == (
        "wide.png",
        600,
        300,
    )
    assert Image.open(io.BytesIO(hit.thumbnail)).size == (64, 32)
    assert index.search(query, 1)[0].thumbnail == b""
    build(str(photos), tmp_path / "index", release, thumbnails=0)
    assert open_index(tmp_path / "index").search(query, 1, thumbnails=True)[0].thumbnail == b""


def test_columns_of_tables_are_metadata_and_conditions(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    day = pa.array([0, 1, None, 2], pa.timestamp("s"))
    table = pa.table(
        {
            "image": [
                "photos/a.jpg",
                "photos/it's.png",
                "photos/Ünïcode 猫.webp",
                "photos/../photos/a.jpg",
            ],
            "year": [1999, 2020, None, 1],
            "File Name": ["it's", "b", "猫", "again"],
            "day": day,
            "score": [0.5, float("nan"), 1.0, 0.0],
            "tags": [["x"], [], None, ["y"]],
            "sizes": [[1, None], [], None, [2]],
        }
    )
    parquet.write_table(table, tmp_path / "table.parquet")
    summary = build(f"parquet:{tmp_path / 'table.parquet'}", tmp_path / "index", release)
    assert (summary.count, summary.repeated) == (3, 1)
    index = open_index(tmp_path / "index")
    query = embeds_of(release, [photos / "a.jpg"])[0]

    def found(where: str) -> set[str]:
        return {hit.id for hit in index.search(query, 10, where)}

    first = index.search(query, 1)[0]
    assert first.metadata | {"digest": ""} == {
        **{
            "path": "photos/a.jpg",
            "width": 40,
            "height": 30,
            "digest": "",
            "year": 1999,
            "File Name": "it's",
        },
        **{"day": "1970-01-01T00:00:00", "score": 0.5, "tags": ["x"], "sizes": [1, None]},
    }
    for hit in index.search(query, 10):
        json.dumps(hit.metadata, allow_nan=False)
    (empty,) = index.search(query, 1, "year IS NULL")
    values = [empty.metadata[name] for name in ("year", "day", "score", "tags", "sizes")]
    assert values == [None, None, 1.0, None, None]
    assert found("year > 2000") == {"photos/it's.png"}
    assert found("year IS NULL OR path = 'photos/it''s.png'") == {
        "photos/it's.png",
        "photos/Ünïcode 猫.webp",
    }
    assert (
        found("`File Name` = 'it''s'")
        == found("lower(path) LIKE '%/A.jpg' OR year < 2000")
        == {"photos/a.jpg"}
    )
    assert found("day >= timestamp '1970-01-01 00:00:01'") == {"photos/it's.png"}
    assert found("width > 1000") == set()
    assert found(
        "cast(year as string) = '1999' and year not in (1, 2) and path ilike 'PHOTOS/%'"
    ) == {"photos/a.jpg"}
    assert found("day < timestamp '1970-01-01 00:00:01' and score % 1 = 0.5") == {"photos/a.jpg"}
    assert found("\"File Name\" = 'b'") == {"photos/it's.png"}


def test_arguments_of_a_search_have_bounds(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    build(str(photos), tmp_path / "index", release)
    index = open_index(tmp_path / "index")
    query = np.eye(DIM, dtype=np.float32)[0]
    for top_k in (0, -1, 1001):
        with pytest.raises(TaskError, match="1 to 1000"):
            index.search(query, top_k)
    with pytest.raises(TaskError, match="the columns: path, width") as error:
        index.search(query, 3, "nosuch = 1")
    assert error.value.code == INVALID_ARGUMENT
    assert len(index.search(query, 3, "width = 40")) == 3


@pytest.mark.parametrize("exact", [True, False])
def test_equal_vectors_come_in_the_order_of_their_ids(
    exact: bool, tmp_path: Path, release: FakeRelease
) -> None:
    """Of 120 images of three kinds, added in no order, the first hits of a kind are its first ids,
    however many.
    """
    folder = tmp_path / "photos"
    out = tmp_path / "index"
    names = np.random.default_rng(0).permutation([f"{number:03}" for number in range(120)])
    for part in (names[:50], names[50:]):
        for name in part:
            write(folder / f"{name}.png", int(name) % 3)
        build(str(folder), out, release, sizes=Sizes() if exact else Sizes(exact=100))
    if not exact:
        search_little(out)
    index = opened(out, few=20)
    for kind in range(3):
        query = embeds_of(release, [folder / f"{kind:03}.png"])[0]
        of_kind = [f"{number:03}.png" for number in range(kind, 120, 3)]
        for top_k in (1, 3, 19, 20):
            assert [hit.id for hit in index.search(query, top_k)] == of_kind[:top_k]
        assert [hit.id for hit in index.search(query, 5, "path > '020'")] == [
            id for id in of_kind if id > "020"
        ][:5]


def test_copies_are_embedded_once_and_all_found(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    shutil.copy(photos / "a.jpg", photos / "b.jpg")
    summary = build(str(photos), tmp_path / "index", release)
    assert (summary.count, summary.embedded, summary.copies, release.embedded) == (13, 12, 1, 12)
    hits = open_index(tmp_path / "index").search(embeds_of(release, [photos / "a.jpg"])[0], 2)
    assert [hit.id for hit in hits] == ["a.jpg", "b.jpg"] and hits[0].score == hits[1].score
    shutil.copy(photos / "a.jpg", photos / "c.jpg")
    assert add(tmp_path / "index", release).embedded == 0


def test_add_embeds_what_is_new_or_changed(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    build(str(photos), tmp_path / "index", release)
    before = release.embedded
    unchanged = add(tmp_path / "index", release)
    assert (unchanged.kept, unchanged.embedded, release.embedded) == (12, 0, before)
    write(photos / "new.png", 50)
    write(photos / "a.jpg", 51)
    os.utime(photos / "it's.png")
    (photos / "deep/er/0.JPG").unlink()
    found = verify(tmp_path / "index")
    assert (found.new, found.changed, found.missing) == (
        ["new.png"],
        ["a.jpg"],
        ["deep/er/0.JPG"],
    ) and not found.ok
    changed = add(tmp_path / "index", release)
    assert (changed.count, changed.embedded, changed.kept, changed.removed) == (13, 2, 10, 0)
    assert verify(tmp_path / "index").missing == ["deep/er/0.JPG"]
    pruned = add(tmp_path / "index", release, prune=True)
    assert (pruned.count, pruned.removed) == (12, 1)
    assert verify(tmp_path / "index").ok
    query = embeds_of(release, [photos / "a.jpg"])[0]
    assert open_index(tmp_path / "index").search(query, 1)[0].score == pytest.approx(1, abs=1e-5)


def test_add_from_elsewhere_and_changed_metadata(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    (tmp_path / "t.csv").write_text("image,title\nphotos/a.jpg,first\n")
    build(f"csv:{tmp_path / 't.csv'}", tmp_path / "index", release)
    write(tmp_path / "other" / "x.png", 7)
    assert add(tmp_path / "index", release, str(tmp_path / "other")).count == 2
    query = embeds_of(release, [tmp_path / "other" / "x.png"])[0]
    assert open_index(tmp_path / "index").search(query, 1)[0].metadata["path"] == "other/x.png"
    assert add(tmp_path / "index", release, str(photos)).kept == 1  # a.jpg, whose title stays
    embedded = release.embedded
    (tmp_path / "t.csv").write_text("image,title\nphotos/a.jpg,second\n")
    add(tmp_path / "index", release)
    assert release.embedded == embedded
    hits = open_index(tmp_path / "index").search(query, 20)
    assert {hit.metadata["title"] for hit in hits if hit.id == "photos/a.jpg"} == {"second"}
    (tmp_path / "t.csv").write_text("image,name\nphotos/a.jpg,second\n")
    with pytest.raises(RAdapterError, match="columns"):
        add(tmp_path / "index", release)


def test_prune_removes_what_is_gone_from_disk_and_nothing_else(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    """Whatever source an addition names, images of other sources stay as long as their files."""
    out = tmp_path / "index"
    other = tmp_path / "other"
    write(other / "x.png", 70)
    write(other / "y.png", 71)
    build(str(photos), out, release)
    added = add(out, release, str(other), prune=True)
    assert (added.count, added.embedded, added.removed) == (14, 2, 0)
    assert add(out, release, prune=True).changed is False
    (photos / "a.jpg").unlink()
    (other / "y.png").unlink()
    pruned = add(out, release, str(other), prune=True)
    assert (pruned.count, pruned.embedded, pruned.removed) == (12, 0, 2)
    hits = open_index(out).search(np.eye(DIM, dtype=np.float32)[0], 20)
    stay = ["it's.png", "Ünïcode 猫.webp", 'quo"te.jpeg', *(f"deep/er/{n}.JPG" for n in range(8))]
    assert {hit.id for hit in hits} == {*stay, str(other / "x.png")}


def test_an_addition_keeps_when_an_index_was_made_first(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    out = tmp_path / "index"
    build(str(photos), out, release)
    long_ago = "2020-02-29T12:00:00+00:00"
    say(out, said(out) | {"created": long_ago, "changed": long_ago})
    write(photos / "new.png", 50)
    add(out, release)
    assert said(out)["created"] == long_ago < said(out)["changed"]
    write(photos / "newer.png", 51)
    build(str(photos), out, release)  # which brings it up to date
    assert said(out)["created"] == long_ago
    build(str(photos), out, release, resume=False)  # which makes it anew
    assert said(out)["created"] > long_ago


def test_a_column_of_another_type_is_refused_before_work(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    (tmp_path / "t.csv").write_text("image,year\nphotos/a.jpg,2001.5\n")
    build(f"csv:{tmp_path / 't.csv'}", tmp_path / "index", release)
    (tmp_path / "t.csv").write_text("image,year\nphotos/a.jpg,2001\n")
    assert add(tmp_path / "index", release).count == 1  # a whole number is one of these, too
    (tmp_path / "t.csv").write_text("image,year\nphotos/a.jpg,2001\nphotos/deep/er/0.JPG,unknown\n")
    before = release.embedded
    with pytest.raises(
        RAdapterError,
        match=r"'year' is string now, and double in the index.*radapter-index build csv:",
    ):
        add(tmp_path / "index", release)
    assert release.embedded == before


def stop_a_build(photos: Path, out: Path, release: FakeRelease) -> str:
    """Build up to a broken image, the last one; returns the error."""
    last = photos / "deep" / "er" / "z.png"
    last.write_bytes(b"broken")
    with pytest.raises(RAdapterError) as error:
        build(str(photos), out, release, sizes=Sizes(batch=4))
    last.unlink()
    return str(error.value)


def test_a_stopped_build_goes_on_unasked(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    why = stop_a_build(photos, tmp_path / "index", release)
    assert "'deep/er/z.png' can't be indexed" in why
    assert "the embeddings so far are kept: give the same command again" in why
    summary = build(str(photos), tmp_path / "index", again := FakeRelease())
    assert (summary.count, summary.kept, again.embedded) == (12, 12, 0)
    assert names(tmp_path) == {"photos", "index"}
    index = tmp_path / "index"
    assert names(index) == {FACTS, "broken.txt", generation(index).name}
    assert names(generation(index)) == {FACTS, "rows.arrow", "vectors.npy"}


def test_a_stopped_build_of_a_table_goes_on_with_its_types(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    names = [f"deep/er/{number}.JPG" for number in range(8)]
    days = pa.array(range(8), pa.timestamp("s"))
    table = pa.table({"image": [*names, "z.png"], "day": [*days, None], "n": range(9)})
    parquet.write_table(table, photos / "t.parquet")
    (photos / "z.png").write_bytes(b"broken")
    with pytest.raises(RAdapterError, match="are kept"):
        build(f"parquet:{photos / 't.parquet'}", tmp_path / "index", release, sizes=Sizes(batch=4))
    write(photos / "z.png", 5)
    summary = build(f"parquet:{photos / 't.parquet'}", tmp_path / "index", again := FakeRelease())
    assert (summary.count, summary.kept, again.embedded) == (9, 8, 1)
    index = open_index(tmp_path / "index")
    (rows,) = index.rows(["day", "n"], 100)
    assert str(rows.schema.field("day").type) == index.facts.plan.column_types["day"]
    query = embeds_of(release, [photos / "a.jpg"])[0]
    hits = index.search(query, 10, "day >= timestamp '1970-01-01 00:00:06' OR day IS NULL")
    assert {hit.metadata["n"] for hit in hits} == {6, 7, 8}


@pytest.mark.parametrize(
    "what", ["release", "columns", "size of thumbnails", "EXIF orientation", "folder"]
)
def test_a_stopped_build_with_other_arguments_is_not_thrown_away_unasked(
    what: str, photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    out = tmp_path / "index"
    stop_a_build(photos, out, release)
    source = str(photos)
    other = FakeRelease()
    options: dict[str, Any] = {}
    if what == "release":
        other = FakeRelease(alpha=0.1)
    elif what == "columns":
        (photos / "t.csv").write_text("image,year\na.jpg,1\n")
        source = f"csv:{photos / 't.csv'}"
    elif what == "folder":
        source = str(photos / "deep")
    else:
        options = {"thumbnails": 64} if "thumbnails" in what else {"exif_orientation": False}
    with pytest.raises(
        RAdapterError,
        match=f"that had another {what}; finish it: radapter-index build.*--no-resume",
    ):
        build(source, out, other, **options)
    assert other.embedded == 0 and not out.exists()
    build(source, out, other, resume=False, **options)
    assert other.embedded > 0 and names(tmp_path) == {"photos", "index"}


def test_a_finished_index_is_not_embedded_again(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    out = tmp_path / "index"
    assert build(str(photos), out, release).changed
    before = said(out)
    summary = build(str(photos), out, again := FakeRelease())
    assert (summary.changed, summary.count, summary.kept, again.embedded) == (False, 12, 12, 0)
    assert said(out) == before
    write(photos / "new.png", 50)
    (photos / "a.jpg").unlink()
    summary = build(str(photos), out, again)
    assert (summary.changed, summary.count, summary.removed, again.embedded) == (True, 12, 1, 1)
    assert (
        verify(out).ok and len(open_index(out).search(np.eye(DIM, dtype=np.float32)[0], 100)) == 12
    )
    assert build(str(photos), out, FakeRelease(), thumbnails=64).embedded == 12
    assert build(str(photos), out, FakeRelease(), thumbnails=64, resume=False).embedded == 12
    assert names(tmp_path) == {"photos", "index"}


def test_a_damaged_index_is_built_again(photos: Path, tmp_path: Path, release: FakeRelease) -> None:
    out = tmp_path / "index"
    build(str(photos), out, release)
    (out / FACTS).write_text("{")
    assert build(str(photos), out, FakeRelease()).embedded == 12
    (generation(out) / "vectors.npy").unlink()
    with pytest.raises(RAdapterError, match="can't be used: .*; build it again: .* --no-resume"):
        add(out, FakeRelease())
    assert build(str(photos), out, FakeRelease()).embedded == 12 and verify(out).ok
    assert names(tmp_path) == {"photos", "index"}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "text", ["", '{"plan"', "[1, 2]", '"text"', '{"plan": 3}', "[" * 200_000, "\x00\udcff"]
)
def test_facts_that_are_none_are_refused_in_a_line(text: str, inside: bool, tmp_path: Path) -> None:
    out = tmp_path / "index"
    write_facts(out, "sha256:1")
    place = generation(out) if inside else out
    (place / FACTS).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        RAdapterError, match=r"can't be read.*; build it again: radapter-index"
    ) as why:
        open_index(out)
    assert str(place / FACTS) in str(why.value) and "\n" not in str(why.value)


def test_an_index_of_another_format_is_refused_with_the_command_that_mends_it(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    out = tmp_path / "index"
    build(str(photos), out, release)
    say(out, said(out) | {"format": 3})
    with pytest.raises(
        RAdapterError,
        match=rf"the format 3 .* reads 6.*: radapter-index build {photos} --out {out}",
    ) as refused:
        open_index(out)
    assert "\n" not in str(refused.value)
    assert build(str(photos), out, FakeRelease()).embedded == 12 and verify(out).ok


def test_who_finds_no_index_is_told_the_command_that_makes_one(tmp_path: Path) -> None:
    out = tmp_path / "my index"

    def told() -> str:
        with pytest.raises(RAdapterError) as refused:
            open_index(out)
        return str(refused.value).rpartition(": radapter-index ")[2]

    assert told() == f"build PHOTOS --out '{out}'"
    (out / FACTS).mkdir(parents=True)  # can't be read as a file
    assert told() == f"build SOURCE --out '{out}'"
    (out / FACTS).rmdir()
    (tmp_path / FACTS).write_text('{"source": "elsewhere"}')
    (out / FACTS).write_text('{"generation": ".."}')  # what lies outside is not looked at
    assert told() == f"build SOURCE --out '{out}'"


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({}, ""),
        ({"image_column": "file"}, "--image-column file "),
        ({"thumbnails": 0}, "--thumbnails 0 "),
        ({"exif_orientation": False}, "--no-exif-orientation "),
        ({"on_broken": "skip"}, "--on-broken skip "),
    ],
)
def test_the_command_that_builds_an_index_again_names_what_is_not_the_default(
    changed: dict[str, Any], flags: str, release: FakeRelease
) -> None:
    made_by = MadeBy.of(release.release)
    plan = Plan("csv:t.csv", "/", "image", {}, 128, True, "refuse", made_by, dict(release.origin))
    command = build_command(Path("my index"), dataclasses.replace(plan, **changed))
    assert command == (
        f"radapter-index build csv:t.csv --out 'my index' {flags}"
        "--model-repository '/models of mine'"
    )


def test_a_build_that_fails_with_nothing_embedded_leaves_nothing(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    class Fails(FakeRelease):
        error: BaseException

        def embed_pixels(self, pixels: Sequence[Any]) -> NDArray[np.float32]:
            raise self.error

    for error in (
        RAdapterError("the server is gone"),
        KeyboardInterrupt(),
        OSError(28, "No space left on device"),
    ):
        Fails.error = error
        with pytest.raises((RAdapterError, KeyboardInterrupt)) as raised:
            build(str(photos), tmp_path / "index", Fails())
        assert "kept" not in str(raised.value) and names(tmp_path) == {"photos"}
    build(str(photos), tmp_path / "index", release)
    with lock(tmp_path / ".index.building", "radapter-index"):
        with pytest.raises(RAdapterError, match="another radapter-index"):
            build(str(photos), tmp_path / "index", FakeRelease(alpha=0.1))
        with pytest.raises(RAdapterError, match="another radapter-index"):
            add(tmp_path / "index", release)
    assert verify(tmp_path / "index").ok


def test_a_build_that_is_interrupted_says_how_to_go_on(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt, match="the embeddings so far are kept: give the same command again"
    ):
        build(str(photos), tmp_path / "index", release, progress=interrupt, sizes=Sizes(batch=5))
    assert build(str(photos), tmp_path / "index", release).kept == 5


@pytest.mark.parametrize(("own", "turns"), [(True, True), (True, False), (False, True)])
def test_an_addition_turns_images_as_the_build_did(
    own: bool, turns: bool, photos: Path, tmp_path: Path
) -> None:
    """As the build was told, whatever the release does by itself."""
    release = FakeRelease(turns=own)
    build(str(photos), tmp_path / "index", release, exif_orientation=turns)
    assert open_index(tmp_path / "index").facts.plan.exif_orientation is turns
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.random.default_rng(9).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "new.png", exif=exif)
    add(tmp_path / "index", FakeRelease(turns=own))
    upright: Any = (np.rot90(pixels, -1) if turns else pixels).ravel() / 255 - 0.5
    (query,) = FakeRelease().embed_pixels([upright])
    (hit,) = open_index(tmp_path / "index").search(query, 1, "path = 'new.png'")
    assert hit.score == pytest.approx(1, abs=1e-5)


def test_files_that_are_left_out_are_counted(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    for name in ("x.gif", "deep/y.GIF", "z.bmp", "README"):
        (photos / name).write_bytes(b"GIF89a")
    assert build(str(photos), tmp_path / "index", release).left_out == {
        ".gif": 2,
        ".bmp": 1,
        ".txt": 1,
        "": 1,
    }
    (tmp_path / "gifs").mkdir()
    (tmp_path / "gifs" / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(RAdapterError, match=r"holds no image; allowed are .jpg.*; it has 1 \.gif"):
        build(str(tmp_path / "gifs"), tmp_path / "other", release)


@pytest.mark.parametrize("name", [" photos", "-x", ".x", "a\tb"])
def test_a_name_that_no_client_could_search_by_is_refused(
    name: str, photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    with pytest.raises(RAdapterError, match="can't be the name of an index; allowed are letters"):
        build(str(photos), tmp_path / name, release)
    assert names(tmp_path) == {"photos"}


def test_a_name_outside_ascii(photos: Path, tmp_path: Path, release: FakeRelease) -> None:
    out = tmp_path / "Bücher 猫" / "Büro"
    build(str(photos), out, release)
    assert add(out, release).kept == 12 and verify(out).ok
    assert len(open_index(out).search(np.eye(DIM, dtype=np.float32)[0], 100)) == 12


def test_what_is_searched_stays_until_it_is_replaced(
    photos: Path, tmp_path: Path, release: FakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An addition that dies before `index.json` is written leaves the old version, however old that
    is.
    """
    out = tmp_path / "index"
    build(str(photos), out, release)
    os.utime(generation(out), (0, 0))
    write(photos / "new.png", 50)
    replace = Path.replace

    def die(made: Path, place: Path) -> Path:
        if place == out / FACTS:
            raise RAdapterError("killed")
        return replace(made, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(RAdapterError, match="killed"):
            add(out, release)
    query = np.eye(DIM, dtype=np.float32)[0]
    assert len(open_index(out).search(query, 100)) == 12
    add(out, release)
    assert len(open_index(out).search(query, 100)) == 13


def test_a_folder_that_cannot_be_read_is_said(
    photos: Path, tmp_path: Path, release: FakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RAdapterError, match=r"cannot read the folder .*deep: Permission denied"):
        build(str(photos), tmp_path / "index", release)


def test_an_addition_that_fails_is_not_seen(
    photos: Path, tmp_path: Path, release: FakeRelease
) -> None:
    build(str(photos), tmp_path / "index", release)
    for number in range(4):
        write(photos / f"z{number}.png", 100 + number)
    (photos / "zz.png").write_bytes(b"broken")
    query = np.eye(DIM, dtype=np.float32)[0]
    with pytest.raises(RAdapterError, match=r"'zz.png' can't be indexed.*--on-broken skip"):
        add(tmp_path / "index", release, sizes=Sizes(batch=2))
    assert len(open_index(tmp_path / "index").search(query, 100)) == 12
    before = open_index(tmp_path / "index")
    embedded = release.embedded
    summary = add(tmp_path / "index", release, on_broken="skip")
    assert (summary.count, release.embedded, list(summary.broken)) == (
        16,
        embedded + 1,
        ["zz.png"],
    )  # z3.png
    assert len(before.search(query, 100)) == 12  # who has it open goes on with what it was
    assert len(open_index(tmp_path / "index").search(query, 100)) == 16


def test_broken_images(photos: Path, tmp_path: Path, release: FakeRelease) -> None:
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    Path(os.fsdecode(os.fsencode(photos) + b"/\xff.jpg")).write_bytes(
        (photos / "a.jpg").read_bytes()
    )
    with pytest.raises(RAdapterError, match="can't be indexed"):
        build(str(photos), tmp_path / "index", release)
    assert not list(tmp_path.glob("*index*"))
    summary = build(str(photos), tmp_path / "index", release, on_broken="skip")
    assert summary.count == 12 and set(summary.broken) == {
        "empty.jpg",
        "cut.jpg",
        "gone.png",
        "\udcff.jpg",
    }
    lines = (tmp_path / "index" / "broken.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        "cut.jpg",
        "empty.jpg",
        "gone.png",
        r"\udcff.jpg",
    ]
    assert verify(tmp_path / "index").new == ["\udcff.jpg"]


def test_nothing_is_written_where_there_is_nothing_to_index(
    tmp_path: Path, release: FakeRelease
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("")
    (tmp_path / "empty.csv").write_text("image\n")
    before = files_of(tmp_path)
    with pytest.raises(RAdapterError, match="holds no image"):
        build(str(tmp_path / "photos"), tmp_path / "index", release)
    with pytest.raises(RAdapterError, match="no folder"):
        build(str(tmp_path / "nowhere"), tmp_path / "index", release)
    with pytest.raises(RAdapterError, match="no row"):
        build(f"csv:{tmp_path / 'empty.csv'}", tmp_path / "index", release)
    with pytest.raises(RAdapterError, match="already exists and is not an index"):
        build(str(tmp_path / "photos"), tmp_path / "photos", release)
    with pytest.raises(RAdapterError, match="radapter-index build"):
        open_index(tmp_path / "index")
    assert files_of(tmp_path) == before
    (tmp_path / "photos" / "b.jpg").write_bytes(b"broken")
    with pytest.raises(RAdapterError, match="none of the 1 images"):
        build(str(tmp_path / "photos"), tmp_path / "index", release, on_broken="skip")
    assert files_of(tmp_path) == before | {"photos/b.jpg"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "image,width\na.jpg,1\n", "image,image\na,b\n", "image,x\n,1\n", ""]
)
def test_tables_that_will_not_do(text: str, tmp_path: Path, release: FakeRelease) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(RAdapterError, match=r"t\.csv"):
        build(f"csv:{tmp_path / 't.csv'}", tmp_path / "index", release)
    assert files_of(tmp_path) == {"t.csv"}


def test_another_release_is_refused_with_the_command_that_rebuilds(
    photos: Path, tmp_path: Path
) -> None:
    build(str(photos), tmp_path / "index", FakeRelease())
    other = FakeRelease(alpha=0.6)
    with pytest.raises(
        RAdapterError, match=rf"alpha 0\.5.*alpha 0\.6.*radapter-index build {photos} --out"
    ):
        add(tmp_path / "index", other)
    same = FakeRelease()
    same.release = dataclasses.replace(same.release, version=7, created="later")
    assert add(tmp_path / "index", same).kept == 12
    build(str(photos), tmp_path / "index", other)
    assert add(tmp_path / "index", other).kept == 12


def test_only_one_writer_at_a_time(photos: Path, tmp_path: Path, release: FakeRelease) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(RAdapterError, match="another radapter-index"):
            build(str(photos), tmp_path / "index", release)

    def addition(done: int, total: int) -> None:
        with pytest.raises(RAdapterError, match="another radapter-index"):
            add(tmp_path / "index", release)

    build(str(photos), tmp_path / "index", release, progress=again)
    build(
        str(photos), tmp_path / "index", release, progress=addition
    )  # it would be lost, or spoil the new one
    assert names(tmp_path) == {"photos", "index"}
    index = tmp_path / "index"
    assert names(index) == {FACTS, "broken.txt", generation(index).name}
    assert names(generation(index)) == {FACTS, "rows.arrow", "vectors.npy"}


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.index.test_index import FakeRelease, Sizes, build
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.2 if done < 6 else 60)
build({photos!r}, Path({out!r}), FakeRelease(), progress=progress, sizes=Sizes(batch=2))
"""


@pytest.mark.slow
def test_a_killed_build_is_resumed(photos: Path, tmp_path: Path, release: FakeRelease) -> None:
    out = tmp_path / "indexes" / "photos"
    code = KILLED.format(tests=str(Path(__file__).parents[2]), photos=str(photos), out=str(out))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "6":
                break
        process.send_signal(signal.SIGKILL)
    time.sleep(0)
    assert not out.exists()
    with pytest.raises(RAdapterError, match="another release"):
        build(str(photos), out, FakeRelease(alpha=0.1))
    summary = build(str(photos), out, release)
    assert (summary.count, summary.kept, release.embedded) == (12, 6, 6)
    assert verify(out).ok and names(tmp_path / "indexes") == {"photos"}
    assert build(str(photos), tmp_path / "fresh", release).embedded == 12  # nothing to go on with


@pytest.mark.parametrize("moment", ["before", "behind"])
def test_a_build_that_is_killed_while_it_is_put_in_place_can_be_given_again(
    moment: str, photos: Path, tmp_path: Path, release: FakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "indexes" / "photos"
    build(str(photos), out, release)

    rename = Path.rename

    def killed(made: Path, place: Path) -> Path:
        if moment == "behind":
            rename(made, place)
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "rename", killed)
        build(str(photos), out, release, resume=False)
    assert verify(out).ok
    assert build(str(photos), out, release).count == 12
    assert build(str(photos), out, FakeRelease(alpha=0.1)).embedded == 12
    assert verify(out).ok and names(tmp_path / "indexes") == {"photos"}
