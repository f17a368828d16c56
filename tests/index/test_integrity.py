"""Damage to the files of an index's table is refused, never answered: by digests, and by what no
score can be.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index import integrity
from radapter_serve.index.build import add, build
from radapter_serve.index.index import open_index
from radapter_serve.index.integrity import DamagedFileError, check_files
from radapter_serve.index.mapped import ROWS, VECTORS, described
from radapter_serve.index.verify import verify
from radapter_serve.index.writer import Sizes
from tests.helpers.indexes import opened, said, say, searched, table
from tests.index.test_index import FakeRelease, embeds_of, write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An index of four photos, of which one was added."""
    for number in range(4):
        write(tmp_path / "photos" / f"{number}.png", number)
        if number > 1:
            build(str(tmp_path / "photos"), tmp_path / "index", FakeRelease())
    return tmp_path / "index"


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def files(out: Path) -> list[Path]:
    """The files that a search reads."""
    return [searched(out) / name for name in said(out)["searched"]]


def grown(out: Path) -> None:
    add(out, FakeRelease())


@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
def test_one_flipped_bit_of_any_file_is_refused_and_named(
    where: float, out: Path, tmp_path: Path
) -> None:
    """Of the table that is written to, when it is verified or written to; of what a search reads,
    when it is opened.
    """
    written = [table(out) / name for name in said(out)["files"]]
    assert {path.parent.name for path in written} >= {"data", "_versions"}
    for path in [*written, *files(out)]:
        before = path.read_bytes()
        flip(path, int(where * len(before)))
        folder = "images.lance" if path in written else "search"
        why = f"{path.name} in {folder} is not.*(build it again|mend it)"
        for tried in (verify, grown if path in written else open_index):
            with pytest.raises(RAdapterError, match=why) as refused:
                tried(out)
            assert "\n" not in str(refused.value)
        path.write_bytes(before)
    assert len(open_index(out)) == 4 and not (tmp_path / ".index.building").exists()


def test_a_damaged_index_is_mended_by_a_build(out: Path, tmp_path: Path) -> None:
    flip(table(out) / next(iter(said(out)["files"])), 100)
    release = FakeRelease()
    assert build(str(tmp_path / "photos"), out, release).embedded == 4 and verify(out).ok
    flip(files(out)[0], 100)
    assert build(str(tmp_path / "photos"), out, release).embedded == 0 and verify(out).ok


def test_rows_of_a_large_index_are_compared_by_verify_and_vectors_whenever_it_is_opened(
    out: Path,
) -> None:
    data = searched(out) / ROWS
    small = searched(out) / VECTORS
    flip(data, data.read_bytes().index(b"\xff\xd8") + 5)  # in a thumbnail
    assert len(opened(out, checked=0)) == 4
    with pytest.raises(RAdapterError, match=data.name):
        verify(out)
    flip(data, data.read_bytes().index(b"\xff\xd8") + 5)
    flip(small, 0)
    with pytest.raises(DamagedFileError, match=small.name):
        opened(out, checked=0)
    flip(small, 0)
    data.write_bytes(data.read_bytes() + b"0")
    with pytest.raises(DamagedFileError, match=data.name):
        opened(out, checked=0)


def test_small_files_of_a_large_folder_are_compared(tmp_path: Path) -> None:
    """Of 1,019 bytes; a small file has less than a 64th of 650."""
    small = tmp_path / "small"
    small.write_bytes(bytes(9))
    (tmp_path / "middle").write_bytes(bytes(10))
    (tmp_path / "large").write_bytes(bytes(1000))
    files = described(tmp_path)
    flip(tmp_path / "middle", 5)
    flip(tmp_path / "large", 500)
    check_files(tmp_path, files, complete=False, checked=650)
    with pytest.raises(DamagedFileError, match="large, middle in"):
        check_files(tmp_path, files, complete=False, checked=1019)
    flip(small, 0)
    with pytest.raises(DamagedFileError, match="small in"):
        check_files(tmp_path, files, complete=False, checked=650)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [1e35, float("nan")])
def test_scores_that_no_cosine_has_are_refused(
    value: float, exact: bool, out: Path, tmp_path: Path
) -> None:
    """A vector of the table is harmed, and the digests are those of the harmed file."""
    if not exact:
        for number in range(4, 120):
            write(tmp_path / "photos" / f"{number}.png", number)
        build(str(tmp_path / "photos"), out, FakeRelease(), sizes=Sizes(exact=100))
        assert said(out)["nearest"]
    query = embeds_of(FakeRelease(), [tmp_path / "photos" / "1.png"])[0]
    facts = said(out)
    path = searched(out) / VECTORS
    data = path.read_bytes()
    assert query.tobytes() in data
    vector = query.copy()
    vector[3] = value
    path.write_bytes(data.replace(query.tobytes(), vector.tobytes()))
    facts["searched"][VECTORS]["digest"] = digest_of(path)
    say(out, facts)
    with pytest.raises(TaskError, match="a file is damaged; the server's log says why") as refused:
        open_index(out).search(query, 3)
    assert refused.value.code == UNKNOWN_INDEX


def test_a_row_without_a_name_is_refused_with_the_command_that_builds_again(
    out: Path, tmp_path: Path
) -> None:
    """A row of the file is harmed, and the digest is that of the harmed file."""
    path = searched(out) / ROWS
    with pa.OSFile(str(path)) as file:
        rows = pa.ipc.open_file(file).read_all()
    names = pa.array([None, *rows["path"].to_pylist()[1:]], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("path"), "path", names)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    facts = said(out)
    facts["searched"][ROWS] = {"size": path.stat().st_size, "digest": digest_of(path)}
    say(out, facts)
    again = f"radapter-index build {tmp_path / 'photos'} --out {out} .*--no-resume"
    with pytest.raises(RAdapterError, match=f"can't be used: .*; build it again: {again}"):
        verify(out)


def test_an_index_that_grows_is_read_once(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Path]()

    def counted(path: Path) -> str:
        read.append(path)
        return digest_of(path)

    monkeypatch.setattr(integrity, "digest_of", counted)
    open_index(out)
    first = len(read)
    open_index(out)
    assert first == len(files(out)) and len(read) == first
    known = set(files(out))
    write(tmp_path / "photos" / "new.png", 9)
    add(out, FakeRelease())
    read.clear()
    open_index(out)
    assert read and not known & set(read)
