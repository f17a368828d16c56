"""Damage to the files of an index is refused, never answered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index import folder, neighbours, writer
from radapter_serve.index.build import add, build, build_from_embeddings, verify
from radapter_serve.index.facts import FACTS
from radapter_serve.index.folder import ROWS, VECTORS
from radapter_serve.index.index import current, open_index
from radapter_serve.index.neighbours import CODES
from tests.helpers.indexes import generation, index_facts, write_index_facts
from tests.helpers.projection import DIM, embeds_of, projecting
from tests.index.test_index import embedded, write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An index of four photos."""
    for number in range(4):
        write(tmp_path / "photos" / f"{number}.png", number)
    build(str(tmp_path / "photos"), tmp_path / "index", projecting())
    return tmp_path / "index"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [ROWS, VECTORS])
def test_one_flipped_bit_of_any_file_is_refused_and_named(
    name: str, out: Path, tmp_path: Path
) -> None:
    flip(generation(out) / name, -1)
    for action in (verify, open_index, lambda out: add(out, projecting())):
        with pytest.raises(RAdapterError, match=f"{name} in g-.* is not.*build it"):
            action(out)
    assert not (tmp_path / ".index.building").exists()


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


@pytest.fixture
def approximate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Search the photos, which are 20 now, by codes."""
    monkeypatch.setattr(writer, "EXACT", 10)
    monkeypatch.setattr(neighbours, "_QUERIES", 10)
    for number in range(20):
        write(tmp_path / "photos" / f"{number}.png", number)


@pytest.mark.usefixtures("approximate")
def test_codes_that_are_damaged_are_made_again_of_the_vectors(tmp_path: Path) -> None:
    release = projecting()
    photos = str(tmp_path / "photos")
    out = tmp_path / "index"
    build(photos, out, release)
    flip(generation(out) / CODES, -1)
    with pytest.raises(RAdapterError, match=f"{CODES} in .*; build it again: radapter-index build"):
        add(out, release)
    summary = build(photos, out, release)
    assert (summary.changed, summary.kept, embedded(release)) == (True, 20, 20)
    assert verify(out).ok and index_facts(out)["nearest"]


@pytest.mark.parametrize(("value", "exact"), [(1e35, True), (np.nan, True), (np.nan, False)])
def test_scores_that_no_cosine_has_are_refused(
    value: float, exact: bool, out: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A vector is harmed, and the digests are those of the harmed file."""
    if not exact:
        request.getfixturevalue("approximate")
        build(str(tmp_path / "photos"), out, projecting())
        assert index_facts(out)["nearest"]
    query = embeds_of([tmp_path / "photos" / "1.png"])[0]
    path = generation(out) / VECTORS
    data = path.read_bytes()
    assert query.tobytes() in data
    vector = query.copy()
    vector[3] = value
    path.write_bytes(data.replace(query.tobytes(), vector.tobytes()))
    facts = index_facts(out)
    facts["files"][VECTORS]["digest"] = digest_of(path)
    write_index_facts(out, facts)
    with pytest.raises(TaskError, match="a file is damaged; the server's log says why") as refused:
        open_index(out).search(query, 3)
    assert refused.value.code == UNKNOWN_INDEX


def test_damage_to_a_stopped_build_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksums of the parts' pages show it."""
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
    out = tmp_path / "index"
    with pytest.raises(RAdapterError, match="can't be resumed: .*; discard it with --no-resume$"):
        build(str(photos), out, projecting())
    assert build(str(photos), out, projecting(), resume=False).count == 4
    # An addition has no such flag.
    part.parent.mkdir()
    part.symlink_to(tmp_path / "nowhere")
    plan = dataclasses.asdict(current(out)[1].plan)
    (part.parent / "building.json").write_text(json.dumps(plan))
    with pytest.raises(RAdapterError, match=f"000000.parquet is gone; remove {part.parent}$"):
        add(out, projecting())


@pytest.mark.parametrize("harm", [VECTORS, ROWS, FACTS])
def test_a_stopped_build_goes_on_when_the_index_that_it_continued_is_damaged(
    harm: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings of the stopped build are kept, and those of the index are made again."""
    monkeypatch.setattr(writer, "BATCH", 2)
    photos = tmp_path / "photos"
    for number in range(4, 8):
        write(photos / f"{number}.png", number)
    (photos / "z.png").write_bytes(b"broken")
    with pytest.raises(RAdapterError, match="are kept"):
        build(str(photos), out, projecting())
    (photos / "z.png").unlink()
    flip(generation(out) / harm, 0)
    later = projecting()
    summary = build(str(photos), out, later)
    assert (summary.count, summary.kept, embedded(later)) == (8, 4, 4)
    assert verify(out).ok
    index = open_index(out)
    for number in range(8):
        [hit] = index.search(embeds_of([photos / f"{number}.png"])[0], 1)
        assert hit.id == f"{number}.png" and hit.score == pytest.approx(1, abs=1e-6)
