"""Damage to the files of an index is refused, never answered: by digests, and by what no score can
be.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index import folder, writer
from radapter_serve.index.build import add, build, build_from_embeddings, verify
from radapter_serve.index.folder import ROWS, VECTORS
from radapter_serve.index.index import open_index
from radapter_serve.index.neighbours import CODES
from tests.helpers.indexes import generation, said, say
from tests.helpers.projection import DIM, embeds_of, projecting
from tests.index.test_index import embedded, write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An index of four photos, of which one was added."""
    for number in range(4):
        write(tmp_path / "photos" / f"{number}.png", number)
        if number > 1:
            build(str(tmp_path / "photos"), tmp_path / "index", projecting())
    return tmp_path / "index"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0.0, 0.99])
def test_one_flipped_bit_of_any_file_is_refused_and_named(
    where: float, out: Path, tmp_path: Path
) -> None:
    for name in said(out)["files"]:
        path = generation(out) / name
        before = path.read_bytes()
        flip(path, int(where * len(before)))
        for tried in (verify, open_index, lambda out: add(out, projecting())):
            with pytest.raises(RAdapterError, match=f"{name} in g-.* is not.*build it") as refused:
                tried(out)
            assert "\n" not in str(refused.value)
        path.write_bytes(before)
    assert len(open_index(out)) == 4 and not (tmp_path / ".index.building").exists()


def test_of_a_large_index_verify_compares_all_and_opening_it_the_codes_and_the_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "CHECKED_AT_OPEN", 0)
    monkeypatch.setattr(writer, "EXACT", 100)
    vectors = np.random.default_rng(0).standard_normal((200, DIM)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    rows = pa.table({"image": [str(number) for number in range(200)]})
    parquet.write_table(rows, tmp_path / "r.parquet")
    files = tmp_path / "v.npy", tmp_path / "r.parquet"
    out = tmp_path / "index"
    build_from_embeddings(*files, out, projecting())
    for name in (ROWS, VECTORS):
        flip(generation(out) / name, 2000)
        assert len(open_index(out)) == 200
        with pytest.raises(RAdapterError, match=name):
            verify(out)
        flip(generation(out) / name, 2000)
    for name in (ROWS, VECTORS, CODES):
        path = generation(out) / name
        before = path.read_bytes()
        path.write_bytes(before + b"0")
        with pytest.raises(RAdapterError, match=name):
            open_index(out)
        path.write_bytes(before)
    flip(generation(out) / CODES, 2000)
    with pytest.raises(RAdapterError, match=CODES):
        open_index(out)


def test_codes_that_are_damaged_are_made_again_of_the_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "EXACT", 100)
    release = projecting()
    photos, out = tmp_path / "photos", tmp_path / "index"
    for number in range(120):
        write(photos / f"{number}.png", number)
    build(str(photos), out, release)
    flip(generation(out) / CODES, 2000)
    with pytest.raises(RAdapterError, match=f"{CODES} in .*; build it again: radapter-index build"):
        add(out, release)
    summary = build(str(photos), out, release)
    assert (summary.changed, summary.kept, embedded(release)) == (True, 120, 120)
    assert verify(out).ok and said(out)["nearest"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [1e35, float("nan")])
def test_scores_that_no_cosine_has_are_refused(
    value: float, exact: bool, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector is harmed, and the digests are those of the harmed file."""
    if not exact:
        monkeypatch.setattr(writer, "EXACT", 100)
        for number in range(4, 120):
            write(tmp_path / "photos" / f"{number}.png", number)
        build(str(tmp_path / "photos"), out, projecting())
        assert said(out)["nearest"]
    query = embeds_of([tmp_path / "photos" / "1.png"])[0]
    path = generation(out) / VECTORS
    data = path.read_bytes()
    assert query.tobytes() in data
    vector = query.copy()
    vector[3] = value
    path.write_bytes(data.replace(query.tobytes(), vector.tobytes()))
    facts = said(out)
    facts["files"][VECTORS]["digest"] = digest_of(path)
    say(out, facts)
    with pytest.raises(TaskError, match="a file is damaged; the server's log says why") as refused:
        open_index(out).search(query, 3)
    assert refused.value.code == UNKNOWN_INDEX


def test_damage_to_a_stopped_build_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the checksums of the parts' pages."""
    monkeypatch.setattr(writer, "BATCH", 2)
    photos = tmp_path / "photos"
    for number in range(4):
        write(photos / f"{number}.png", number)
    (photos / "z.png").write_bytes(b"broken")
    with pytest.raises(RAdapterError, match="are kept"):
        build(str(photos), tmp_path / "index", projecting())
    (photos / "z.png").unlink()
    part = tmp_path / ".index.building" / "000000.parquet"
    vector = embeds_of([photos / "0.png"])[0].tobytes()
    flip(part, part.read_bytes().index(vector[:4]))
    with pytest.raises(RAdapterError, match="can't be resumed: .*; discard it with --no-resume"):
        build(str(photos), tmp_path / "index", projecting())
    assert build(str(photos), tmp_path / "index", projecting(), resume=False).count == 4
