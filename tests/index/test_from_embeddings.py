"""An index of embeddings that somebody has already: searched as numpy searches them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from radapter_serve.cli.index import main
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import add, build, build_from_embeddings, verify
from radapter_serve.index.collection import read_rows
from radapter_serve.index.index import open_index
from tests.helpers.indexes import generation
from tests.helpers.projection import DIM, projecting
from tests.index.test_index import embedded, write

COUNT = 5000  # more than are read at once
NAMES = [f"photos/{number}.jpg" for number in range(COUNT)]


@pytest.fixture
def vectors() -> Any:
    """Of many lengths."""
    return np.random.default_rng(0).standard_normal((COUNT, DIM)) * 7


@pytest.fixture
def files(tmp_path: Path, vectors: Any) -> tuple[Path, Path]:
    np.save(tmp_path / "v.npy", vectors)
    years = [None if number % 7 == 0 else number for number in range(COUNT)]
    shares = [float("nan") if number == 3 else number / COUNT for number in range(COUNT)]
    rows = pa.table({"year": years, "image": NAMES, "share": shares})
    parquet.write_table(rows, tmp_path / "r.parquet")
    return tmp_path / "v.npy", tmp_path / "r.parquet"


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_searches_are_numpys(
    dtype: str, files: tuple[Path, Path], vectors: Any, tmp_path: Path
) -> None:
    np.save(files[0], vectors.astype(dtype))
    out = tmp_path / "index"
    summary = build_from_embeddings(*files, out, projecting())
    assert (summary.count, summary.embedded, summary.recall) == (COUNT, 0, None)
    unit = vectors.astype(dtype).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    query = unit[42].astype(np.float32)
    index = open_index(out)
    hits = index.search(query, 20, "year < 3000")
    scores = unit @ query
    scores[3000:] = -2
    scores[::7] = -2
    best = np.argsort(-scores)[:20]
    assert [hit.id for hit in hits] == [NAMES[number] for number in best]
    np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-6)
    assert [hit.metadata["year"] for hit in hits] == best.tolist()
    (missing,) = index.search(query, 10, "share IS NULL")  # NaN is NULL
    assert missing.id == "photos/3.jpg" and missing.metadata["share"] is None
    assert verify(out).ok


def test_vectors_are_never_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.index.build._ROWS", 50)
    wide = np.random.default_rng(0).standard_normal((500, 2000))
    np.save(tmp_path / "v.npy", wide)
    parquet.write_table(pa.table({"image": NAMES[:500]}), tmp_path / "r.parquet")
    loaded = projecting(embed_dim=2000)
    tracemalloc.start()
    build_from_embeddings(tmp_path / "v.npy", tmp_path / "r.parquet", tmp_path / "index", loaded)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < wide.nbytes / 2


@pytest.mark.slow
def test_a_search_loads_no_pandas(files: tuple[Path, Path], tmp_path: Path) -> None:
    """It would cost a server some 30 MB."""
    out = tmp_path / "index"
    build_from_embeddings(*files, out, projecting())
    code = (
        "import sys, numpy as np\n"
        "from radapter_serve.index.index import open_index\n"
        f"index = open_index({str(out)!r})\n"
        "where = \"year < 3000 AND (path IN ('a') OR share > 0.1)\"\n"
        f"assert len(index.search(np.ones({DIM}, np.float32) / 4, 5, where)) == 5\n"
        "assert index.embeddings(['photos/3.jpg']) and 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_index_names_the_command_that_makes_it_again(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "index"
    build_from_embeddings(*files, out, projecting())
    command = f"radapter-index build --from-embeddings {files[0]} --rows {files[1]} --out {out}"
    with pytest.raises(RAdapterError, match=f"was made of embeddings; .*{command}"):
        add(out, projecting())
    first = generation(out)
    assert build_from_embeddings(*files, out, projecting()).count == COUNT
    assert generation(out) != first and len(open_index(out)) == COUNT
    # A build of images replaces it.
    write(tmp_path / "photos" / "a.png", 1)
    assert build(str(tmp_path / "photos"), out, projecting()).count == 1


@pytest.mark.parametrize("resume", [True, False])
def test_a_stopped_build_of_images_goes_on_later_unless_it_is_discarded(
    resume: bool, files: tuple[Path, Path], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    out = tmp_path / "index"
    write(photos / "a.png", 1)
    with pytest.raises(KeyboardInterrupt, match="are kept"):
        build(str(photos), out, projecting(), progress=Mock(side_effect=KeyboardInterrupt))
    assert build_from_embeddings(*files, out, projecting(), resume=resume).count == COUNT
    assert len(open_index(out)) == COUNT and not (out / "broken.txt").exists()
    later = projecting()
    assert build(str(photos), out, later).count == 1
    assert embedded(later) == (0 if resume else 1)


ROW = np.arange(COUNT)[:, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors: np.where(ROW == 4999, 0, vectors), "row 4999: the vector has no"),
        (lambda vectors: np.where(ROW == 7, np.nan, vectors), "row 7: the vector has no"),
        (lambda vectors: vectors[:, :9], f"have the width 9, and .* of release 1 have {DIM}"),
        (lambda vectors: vectors.astype(int), r"are int64 \[5000, 16\]; allowed: .* numpy.save"),
        (lambda vectors: np.repeat(vectors[:1, 0], COUNT), r"are float64 \[5000\]; allowed"),
        (lambda vectors: np.array([{}] * COUNT, object), "Python objects, .* never unpickled; all"),
        (lambda vectors: vectors[1:], "has 5,000 rows, and .* 4,999 vectors"),
        ({"image": ["x", "x", *NAMES[2:]]}, "names 'x' twice"),
        ({"id": NAMES}, "no column 'image'; .* see --image-column"),
        ({"image": ["x", "", *NAMES[2:]]}, "row 2: 'image' is not a path"),
        ({"image": NAMES, "Width": NAMES}, "has a column 'Width'; the index needs"),
        ("v.npy", r"v\.npy: .*magic string.*; allowed: a \.npy file of floats"),
        ("r.parquet", "is not PARQUET that can be read"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_leave_nothing(
    change: Any, message: str, files: tuple[Path, Path], vectors: Any, tmp_path: Path
) -> None:
    """A dict has the columns of another table, and a name is that of a file full of noise."""
    if callable(change):
        np.save(files[0], change(vectors))
    elif isinstance(change, dict):
        parquet.write_table(pa.table(change), files[1])
    else:
        (tmp_path / change).write_bytes(b"noise")
    with pytest.raises(RAdapterError, match=message) as error:
        build_from_embeddings(*files, tmp_path / "index", projecting())
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*index*"))


def header(text: str) -> bytes:
    """A `.npy` file of nothing but a header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (10, 99999999999999999999)}\n"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 16)}\n"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 16)}\n"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1," + "(" * 300 + "\n"),
        header("{'descr': ['<f4', 3], 'fortran_order': False, 'shape': (1, 16)}\n"),
        header("{'descr': ',', 'fortran_order': False, 'shape': (1, 16)}\n"),
    ],
)
def test_a_broken_header_of_vectors_has_one_line(
    data: bytes, files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[0].write_bytes(data)
    with pytest.raises(
        RAdapterError, match="could not read the vectors|vectors of .* are"
    ) as error:
        build_from_embeddings(*files, tmp_path / "index", projecting())
    assert "\n" not in str(error.value)


def nested(table: pa.Table) -> pa.Table:
    """A table with a list of two million values in its last row."""
    lists: list[list[int]] = [[]] * (len(table) - 1) + [[1] * 2_000_000]
    return table.append_column("list", pa.array(lists, pa.list_(pa.int8())))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"image": ["a" * 100_000] * 2000}), "unfolds to more than 1 MiB .2,000 rows"),
        (pa.table({"image": pa.array(["a" * 1000] * 5000).dictionary_encode()}), "unfolds to"),
        (nested(pa.table({"image": ["a"] * 2000})), "unfolds to more than 1 MiB"),
        (pa.table({"image": pa.nulls(2**24, pa.string())}), r"MiB \(16,777,216 rows, 1 columns"),
        (
            pa.table({str(number): [1] for number in range(1001)}),
            "has 1,001 columns; at most 1,000",
        ),
    ],
)
def test_a_small_table_does_not_unfold_to_a_large_one(
    table: pa.Table, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.index.collection._SMALL", 1 << 20)
    monkeypatch.setattr("radapter_serve.index.collection._UNFOLDED", 10)
    parquet.write_table(table, tmp_path / "r.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    with pytest.raises(RAdapterError, match=message) as error:
        read_rows(tmp_path / "r.parquet", "image")
    assert "\n" not in str(error.value)
    assert pa.total_allocated_bytes() - before < 8 << 20


def test_a_pipe_or_a_device_is_no_table_no_image_and_no_vectors(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe = tmp_path / "photos" / "pipe.png"
    device = tmp_path / "photos" / "zero.png"
    write(tmp_path / "photos" / "a.png", 1)
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    out = tmp_path / "index"
    summary = build(str(tmp_path / "photos"), out, projecting(), on_broken="skip")
    why = "it is not a regular file"
    assert summary.count == 1
    assert summary.broken == {"pipe.png": why, "zero.png": why}
    for path in (pipe, device):
        for source in (f"csv:{path}", f"parquet:{path}"):
            with pytest.raises(RAdapterError, match=why):
                build(source, out, projecting())
        with pytest.raises(RAdapterError, match=why):
            build_from_embeddings(path, files[1], out, projecting())
    (tmp_path / "photos" / "a.png").unlink()
    os.mkfifo(tmp_path / "photos" / "a.png")
    assert verify(out).missing == ["a.png"]


def test_the_command(
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    release = projecting()
    monkeypatch.setattr("radapter_serve.encoders.loaded.release_at", lambda *_: release)
    csv.write_csv(parquet.read_table(files[1]).rename_columns(["year", "id", "share"]), "r.csv")
    call = ["build", "--from-embeddings", "v.npy", "--rows", "r.csv", "--image-column", "id"]
    assert main([*call, "--out", "indexes/photos"]) == 0
    assert "indexes/photos: 5,000 images\n" in capsys.readouterr().out
    for wrong in (["photos", *call[1:]], call[1:3], ["--rows", "r.csv", "photos"], []):
        assert main(["build", *wrong, "--out", "other"]) == 2
        assert "--from-embeddings" in capsys.readouterr().err
    assert embedded(release) == 0
