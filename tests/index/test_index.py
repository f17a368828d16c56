"""An index is built, added to and verified, against the files on disk."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.files import lock
from radapter_serve.index import folder as generations
from radapter_serve.index import writer
from radapter_serve.index.build import add, build, build_from_embeddings, verify
from radapter_serve.index.facts import FACTS
from radapter_serve.index.index import current, open_index
from tests.helpers.indexes import generation, index_facts, write_facts, write_index_facts
from tests.helpers.projection import DIM, TEXTS, Projection, embeds_of, projecting


@pytest.fixture(autouse=True)
def batches_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH", 4)


@pytest.fixture
def release() -> LoadedRelease:
    return projecting()


def embedded(release: LoadedRelease) -> int:
    """The number of images that a release has embedded, with all changed copies of it."""
    assert isinstance(release.encoder, Projection)
    return release.encoder.embedded


DEEP = [f"deep/er/{number}.JPG" for number in range(8)]
NAMES = ["a.jpg", "it's.png", "Ünïcode 猫.webp", 'quo"te.jpeg', *DEEP]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images in folders, with names that need care."""
    folder = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        write(folder / name, number)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_text("no image")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of an index that is not built yet."""
    return tmp_path / "index"


def write(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path, kind, quality=95)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ANY = np.eye(DIM, dtype=np.float32)[0]


def ids(out: Path, query: NDArray[np.float32] = ANY, where: str | None = None) -> list[str]:
    """All images of an index that meet a condition, best first."""
    return [hit.id for hit in open_index(out).search(query, 1000, where)]


def test_metadata_and_thumbnails(photos: Path, out: Path, release: LoadedRelease) -> None:
    write(photos / "wide.png", 99, (600, 300))
    for pixels in (-1, 1025):
        with pytest.raises(RAdapterError, match=f"--thumbnails is {pixels}; allowed: 0"):
            build(str(photos), out, release, thumbnails=pixels)
    build(str(photos), out, release, thumbnails=64)
    query = embeds_of([photos / "wide.png"])[0]
    (hit,) = open_index(out).search(query, 1, thumbnails=True)
    digest = hit.metadata.pop("digest")
    assert hit.metadata == {"path": "wide.png", "width": 600, "height": 300} and digest
    assert Image.open(io.BytesIO(hit.thumbnail)).size == (64, 32)
    assert open_index(out).search(query, 1)[0].thumbnail == b""
    # The sides are those of what was embedded; a thumbnail is upright.
    exif = Image.Exif()
    exif[274] = 6
    Image.open(photos / "wide.png").save(photos / "turned.png", exif=exif)
    for turns, sides in ((True, (300, 600)), (False, (600, 300))):
        build(str(photos), out, projecting(), thumbnails=64, exif_orientation=turns)
        (photos / "late.png").write_bytes((photos / "turned.png").read_bytes() + b" ")
        add(out, projecting())  # turns images as the build did
        for name in ("turned.png", "late.png"):
            (hit,) = open_index(out).search(query, 1, f"path = '{name}'", thumbnails=True)
            assert (hit.metadata["width"], hit.metadata["height"]) == sides
            assert Image.open(io.BytesIO(hit.thumbnail)).size == (32, 64)
        (photos / "late.png").unlink()


def test_columns_of_tables_are_metadata_and_conditions(
    photos: Path, out: Path, release: LoadedRelease
) -> None:
    first, second, third = NAMES[:3]
    columns = {
        "image": [first, second, third, f"../photos/{first}"],
        "year": [1999, 2020, None, 1],
        "File Name": ["it's", "b", "猫", "again"],
        "day": pa.array([0, 1, None, 2], pa.timestamp("s")),
        "score": [0.5, float("nan"), 1.0, 0.0],
        "tags": [["x"], [], None, ["y"]],
        "sizes": [[1, None], [], None, [2]],
    }
    parquet.write_table(pa.table(columns), photos / "table.parquet")
    summary = build(f"parquet:{photos / 'table.parquet'}", out, release)
    assert (summary.count, summary.repeated) == (3, 1)
    query = embeds_of([photos / first])[0]
    hits = open_index(out).search(query, 10)
    assert hits[0].metadata | {"digest": ""} == {
        **{"path": first, "width": 40, "height": 30, "digest": "", "year": 1999},
        **{"File Name": "it's", "day": "1970-01-01T00:00:00", "score": 0.5},
        **{"tags": ["x"], "sizes": [1, None]},
    }
    for hit in hits:
        json.dumps(hit.metadata, allow_nan=False)
    (empty,) = open_index(out).search(query, 1, "year IS NULL")
    values = [empty.metadata[name] for name in ("year", "day", "score", "tags", "sizes")]
    assert values == [None, None, 1.0, None, None]
    for where, hits_of in (
        ("year IS NULL OR path = 'it''s.png'", {second, third}),
        ("`File Name` = 'it''s'", {first}),
        ("day >= timestamp '1970-01-01 00:00:01'", {second}),
        ("width > 1000", set()),
    ):
        assert set(ids(out, query, where)) == hits_of, where


@pytest.mark.parametrize("exact", [True, False])
def test_equal_vectors_come_in_the_order_of_their_ids(
    exact: bool, tmp_path: Path, out: Path, release: LoadedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hits of 120 images of three kinds are the first ids of a kind, however many."""
    monkeypatch.setattr(generations, "FEW", 20)
    numbers = np.random.default_rng(0).permutation(120)
    np.save(tmp_path / "v.npy", TEXTS[numbers % 3])
    rows = pa.table({"image": [f"{number:03}" for number in numbers]})
    parquet.write_table(rows, tmp_path / "r.parquet")
    if not exact:
        monkeypatch.setattr(writer, "EXACT", 100)
    build_from_embeddings(tmp_path / "v.npy", tmp_path / "r.parquet", out, release)
    if not exact:  # a search looks into one cell, for one candidate
        facts = index_facts(out)
        facts["nearest"] |= {"nprobes": 1, "candidates": 1}
        write_index_facts(out, facts)
    index = open_index(out)
    for kind in range(3):
        of_kind = [f"{number:03}" for number in range(kind, 120, 3)]
        for top_k in (1, 19):
            assert [hit.id for hit in index.search(TEXTS[kind], top_k)] == of_kind[:top_k]
        for first in ("020", "100"):  # more rows than are all compared, and fewer
            later = [id for id in of_kind if id > first][:5]
            assert [hit.id for hit in index.search(TEXTS[kind], 5, f"path > '{first}'")] == later


def test_copies_are_embedded_once_and_all_found(
    photos: Path, out: Path, release: LoadedRelease
) -> None:
    shutil.copy(photos / "a.jpg", photos / "b.jpg")
    summary = build(str(photos), out, release)
    assert (summary.count, summary.embedded, summary.copies, embedded(release)) == (13, 12, 1, 12)
    hits = open_index(out).search(embeds_of([photos / "a.jpg"])[0], 2)
    assert [hit.id for hit in hits] == ["a.jpg", "b.jpg"] and hits[0].score == hits[1].score
    shutil.copy(photos / "a.jpg", photos / "c.jpg")
    write(photos / "d.jpg", 50)  # in the batch of the copies
    assert add(out, release).embedded == 1 and len(ids(out)) == 15


def test_an_addition_embeds_what_is_new_or_changed(
    photos: Path, out: Path, release: LoadedRelease
) -> None:
    build(str(photos), out, release)
    long_ago = "2020-02-29T12:00:00+00:00"
    write_index_facts(out, index_facts(out) | {"created": long_ago, "changed": long_ago})
    unchanged = add(out, release)
    assert (unchanged.kept, unchanged.embedded, unchanged.changed) == (12, 0, False)
    write(photos / "new.png", 50)
    write(photos / "a.jpg", 51)
    os.utime(photos / "it's.png")
    (photos / DEEP[0]).unlink()
    report = verify(out)
    assert (report.new, report.changed, report.missing) == (["new.png"], ["a.jpg"], DEEP[:1])
    changed = add(out, release)
    assert (changed.count, changed.embedded, changed.kept, changed.removed) == (13, 2, 10, 0)
    assert verify(out).missing == DEEP[:1]
    pruned = add(out, release, prune=True)
    assert (pruned.count, pruned.removed) == (12, 1)
    assert verify(out).ok
    query = embeds_of([photos / "a.jpg"])[0]
    assert open_index(out).search(query, 1)[0].score == pytest.approx(1, abs=1e-5)
    assert index_facts(out)["created"] == long_ago < index_facts(out)["changed"]
    build(str(photos), out, release, resume=False)
    assert index_facts(out)["created"] > long_ago


def test_an_addition_from_elsewhere_prunes_files_that_are_gone_and_no_others(
    photos: Path, tmp_path: Path, out: Path, release: LoadedRelease
) -> None:
    other = tmp_path / "other"
    write(other / "x.png", 70)
    write(other / "y.png", 71)
    build(str(photos), out, release)
    added = add(out, release, str(other), prune=True)
    assert (added.count, added.embedded, added.removed) == (14, 2, 0)
    (photos / "a.jpg").unlink()
    (other / "y.png").unlink()
    pruned = add(out, release, str(other), prune=True)
    assert (pruned.count, pruned.embedded, pruned.removed) == (12, 0, 2)
    assert set(ids(out)) == {*NAMES[1:], str(other / "x.png")}

    # The last image stays, as an index of none can't be opened.
    shutil.rmtree(photos)
    (other / "x.png").unlink()
    (other / "z.png").write_bytes(b"broken")
    before = index_facts(out)
    with pytest.raises(RAdapterError, match="every image of the index .* is gone"):
        add(out, release, str(other), prune=True, on_broken="skip")
    assert index_facts(out) == before and len(open_index(out)) == 12
    assert names(tmp_path) == {"index", "other"}


def test_an_addition_to_a_table_takes_new_metadata_and_refuses_other_columns(
    photos: Path, out: Path, release: LoadedRelease
) -> None:
    source = photos / "t.csv"
    source.write_text("image,year\na.jpg,2001.5\n")
    build(f"csv:{source}", out, release)
    assert add(out, release, str(photos)).kept == 1  # a.jpg keeps its year
    source.write_text("image,year\na.jpg,2001\n")  # whole numbers are floats, too
    before = embedded(release)
    add(out, release)
    assert embedded(release) == before and ids(out, where="year = 2001") == ["a.jpg"]
    for text, message in (
        ("image,name\na.jpg,second\n", "columns"),
        (f"image,year\na.jpg,2001\n{DEEP[0]},unknown\n", "'year' is string now, and double in the"),
    ):
        source.write_text(text)
        with pytest.raises(RAdapterError, match=f"{message}.*radapter-index build csv:"):
            add(out, release)
    assert embedded(release) == before


def stop_a_build(photos: Path, out: Path, release: LoadedRelease) -> str:
    """Build up to a broken image, the last one; returns the error."""
    last = photos / "deep" / "er" / "z.png"
    last.write_bytes(b"broken")
    with pytest.raises(RAdapterError) as error:
        build(str(photos), out, release)
    last.unlink()
    return str(error.value)


def test_a_stopped_build_continues_by_default(
    photos: Path, tmp_path: Path, out: Path, release: LoadedRelease
) -> None:
    error = stop_a_build(photos, out, release)
    assert "'deep/er/z.png' can't be indexed" in error
    later = projecting()
    with pytest.raises(KeyboardInterrupt, match="so far are kept: give the same command again"):
        build(str(photos), out, later, progress=Mock(side_effect=KeyboardInterrupt))
    summary = build(str(photos), out, later)
    assert (summary.count, summary.kept, embedded(later)) == (12, 12, 0)
    assert names(tmp_path) == {"photos", "index"}
    assert names(out) == {FACTS, "broken.txt", generation(out).name}
    assert names(generation(out)) == {FACTS, "rows.arrow", "vectors.npy"}


@pytest.mark.parametrize("what", ["image tower", "columns", "size of thumbnails", "folder"])
def test_a_stopped_build_with_other_arguments_is_kept(
    what: str, photos: Path, tmp_path: Path, out: Path, release: LoadedRelease
) -> None:
    stop_a_build(photos, out, release)
    (photos / "t.csv").write_text("image,year\na.jpg,1\n")
    sources = {"columns": f"csv:{photos / 't.csv'}", "folder": str(photos / "deep")}
    source = sources.get(what, str(photos))
    other = projecting(alpha=0.1 if what == "image tower" else 0.5)
    options: dict[str, Any] = {"thumbnails": 64} if what == "size of thumbnails" else {}
    message = f"it had another {what}, to finish with radapter-index build.*--no-resume"
    with pytest.raises(RAdapterError, match=message):
        build(source, out, other, **options)
    assert embedded(other) == 0 and not out.exists()
    build(source, out, other, resume=False, **options)
    assert embedded(other) > 0 and names(tmp_path) == {"photos", "index"}


def test_a_finished_index_is_not_embedded_again(
    photos: Path, tmp_path: Path, out: Path, release: LoadedRelease
) -> None:
    assert build(str(photos), out, release).changed
    before = index_facts(out)
    summary = build(str(photos), out, release)
    assert (summary.changed, summary.kept, embedded(release)) == (False, 12, 12)
    assert index_facts(out) == before
    (photos / "a.jpg").unlink()
    assert build(str(photos), out, release).removed == 1 and len(ids(out)) == 11
    assert build(str(photos), out, release, thumbnails=64).embedded == 11
    assert names(tmp_path) == {"photos", "index"}


def test_an_index_that_is_damaged_or_of_another_format_is_built_again(
    photos: Path, tmp_path: Path, out: Path
) -> None:
    build(str(photos), out, projecting())
    (out / FACTS).write_text("{")
    assert build(str(photos), out, projecting()).embedded == 12
    (generation(out) / "vectors.npy").unlink()
    assert build(str(photos), out, projecting()).embedded == 12
    write_index_facts(out, index_facts(out) | {"format": 3})
    with pytest.raises(RAdapterError, match="the format 3 .* reads 7.*: radapter-index build"):
        open_index(out)
    assert build(str(photos), out, projecting()).embedded == 12 and verify(out).ok
    assert names(tmp_path) == {"photos", "index"}


@pytest.mark.parametrize(
    ("text", "inside"),
    [("[1, 2]", False), ('{"plan": 3}', True), ("[" * 200_000, False), ("\x00\udcff", True)],
)
def test_broken_facts_are_an_error_of_one_line(text: str, inside: bool, out: Path) -> None:
    with pytest.raises(RAdapterError, match=f"make one: radapter-index build PHOTOS --out {out}"):
        open_index(out)
    write_facts(out, "sha256:1")
    place = generation(out) if inside else out
    (place / FACTS).write_bytes(text.encode(errors="surrogateescape"))
    message = rf"{place / FACTS} can't be read.*; build it again: radapter-index"
    with pytest.raises(RAdapterError, match=message) as error:
        open_index(out)
    assert "\n" not in str(error.value)
    (out / FACTS).write_text('{"generation": ".."}')  # nothing outside is read
    with pytest.raises(RAdapterError, match="it names the generation"):
        open_index(out)


def test_the_command_that_builds_an_index_again_names_what_is_not_the_default(
    photos: Path, out: Path
) -> None:
    source = f"csv:{photos / 't.csv'}"
    (photos / "t.csv").write_text("file\na.jpg\n")
    options: dict[str, Any] = {"image_column": "file", "exif_orientation": False}
    build(source, out, projecting(), thumbnails=0, on_broken="skip", **options)
    flags = "--thumbnails 0 --no-exif-orientation --image-column file --on-broken skip"
    assert current(out)[1].plan.command(Path("my index")) == (
        f"radapter-index build {source} --out 'my index' {flags}"
        " --model-repository '/models of mine'"
    )


def test_only_one_writer_at_a_time(photos: Path, out: Path, release: LoadedRelease) -> None:
    build(str(photos), out, release)
    with lock(out.with_name(".index.building"), "radapter-index"):
        with pytest.raises(RAdapterError, match="another radapter-index"):
            build(str(photos), out, projecting(alpha=0.1))
        with pytest.raises(RAdapterError, match="another radapter-index"):
            add(out, release)
    assert verify(out).ok


@pytest.mark.parametrize("step", ["rename", "replace"])
def test_a_build_that_is_killed_while_it_is_put_in_place_leaves_the_old_index(
    step: str, photos: Path, out: Path, release: LoadedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old that is."""
    build(str(photos), out, release)
    os.utime(generation(out), (0, 0))
    write(photos / "new.png", 50)
    replace = Path.replace

    def killed(source: Path, place: Path) -> Path:
        if step == "rename" or place == out / FACTS:
            raise SystemExit
        return replace(source, place)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, step, killed)
        add(out, release)
    (out / f".{FACTS}.1.new").touch()  # as SIGKILL leaves it
    assert len(ids(out)) == 12
    assert add(out, release).count == 13
    assert not list(out.glob(".*"))
    assert build(str(photos), out, projecting(alpha=0.1)).embedded == 13
    assert verify(out).ok and names(out.parent) == {"photos", "index"}


def test_broken_images(photos: Path, tmp_path: Path, out: Path, release: LoadedRelease) -> None:
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    shutil.copy(photos / "a.jpg", os.fsdecode(os.fsencode(photos) + b"/\xff.jpg"))
    with pytest.raises(RAdapterError) as error:
        build(str(photos), out, release)
    refused = ["cut.jpg", "empty.jpg", "gone.png", "\udcff.jpg"]
    assert all(f"{name!r} can't be indexed: " in str(error.value) for name in refused)
    assert not list(tmp_path.glob("*index*"))
    summary = build(str(photos), out, release, on_broken="skip")
    assert summary.count == 12
    assert sorted(summary.broken) == refused and embedded(release) == 12  # each once
    for number in range(11):
        (photos / f"{number}.png").write_bytes(b"")
    with pytest.raises(RAdapterError) as error:
        build(str(photos), out, release)
    assert str(error.value).count("can't be indexed") == 10
    for number in range(11):
        (photos / f"{number}.png").unlink()
    lines = (out / "broken.txt").read_text(encoding="utf-8").splitlines()
    broken = [line.split("\t")[0] for line in lines]
    assert broken == ["cut.jpg", "empty.jpg", "gone.png", r"\udcff.jpg"]
    assert verify(out).new == ["\udcff.jpg"]


def test_nothing_is_written_where_there_is_nothing_to_index(
    tmp_path: Path, out: Path, release: LoadedRelease
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.txt").write_text("")
    (tmp_path / "empty.csv").write_text("image\n")
    (tmp_path / "twice.csv").write_text("image,image\na,b\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / FACTS).write_text('{"at": "qdrant:http://127.0.0.1:1/photos"}')
    before = sorted(tmp_path.rglob("*"))
    for source, place, message in (
        (folder, out, "holds no image"),
        (tmp_path / "nowhere", out, "is not a folder"),
        (f"csv:{tmp_path / 'empty.csv'}", out, "no row"),
        (f"csv:{tmp_path / 'twice.csv'}", out, "has the column 'image' twice"),
        (folder, folder, "already exists and is not an index"),
        (folder, tmp_path / "linked", "links to a published index, which is read-only"),
        *((folder, tmp_path / name, "can't be the name of an") for name in (" i", "-i", ".i")),
    ):
        with pytest.raises(RAdapterError, match=message):
            build(str(source), place, release)
    assert sorted(tmp_path.rglob("*")) == before
    (folder / "b.jpg").write_bytes(b"broken")
    with pytest.raises(RAdapterError, match="none of the 1 images"):
        build(str(folder), out, release, on_broken="skip")
    assert not list(tmp_path.glob("*index*"))
