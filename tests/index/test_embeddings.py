"""Embeddings of a collection in clip-retrieval's layout, read by NumPy and pandas, against
open_clip.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image

from radapter_serve.cli.index import main
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.index.embeddings import export_embeddings
from tests.helpers.small_disk import small_disk
from tests.index.test_neighbours import Ready, clustered, write_numbers

COUNT = 11
ELEVEN = [f"{number:02}" for number in range(COUNT)]  # so that they sort by their names


@pytest.fixture(scope="module")
def place(exported_tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a table of them, and the index `photos` of that table. Not to be
    changed.
    """
    folder = tmp_path_factory.mktemp("embeddings")
    (folder / "images").mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    rows = [f"images/{number}.png,{2000 + number},größer {number}" for number in range(COUNT)]
    (folder / "photos.csv").write_text("\n".join(["image,year,note", *rows]), encoding="utf-8")
    build(
        f"csv:{folder / 'photos.csv'}",
        folder / "photos",
        load_release(exported_tiny_clip / "model_repository"),
    )
    return folder


@torch.no_grad()
def by_open_clip(exported: Path, files: list[str]) -> np.ndarray:
    merged = sorted(exported.glob("merged/**/open_clip_config.json"))[-1].parent
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    pixels = torch.stack([transform(Image.open(file)) for file in files])  # type: ignore[operator]
    return model.eval().encode_image(pixels, normalize=True).numpy()  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("part", "names"), [(3, ["0", "1", "2", "3"]), (1_000_000, ["0"]), (1, ELEVEN)]
)
def test_rows_of_arrays_are_rows_of_tables(
    place: Path,
    exported_tiny_clip: Path,
    tmp_path: Path,
    part: int,
    names: list[str],
) -> None:
    assert export_embeddings(place / "photos", tmp_path / "out", part=part, batch=2) == COUNT
    files = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert files == {f"img_emb/img_emb_{n}.npy" for n in names} | {
        f"metadata/metadata_{n}.parquet" for n in names
    }
    arrays = [np.load(path) for path in sorted((tmp_path / "out" / "img_emb").iterdir())]
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "out" / "metadata").iterdir())]
    assert [len(array) for array in arrays] == [len(table) for table in tables]
    table = pd.concat(tables)
    assert {"image_path", "path", "year", "note", "width", "height"} <= {*table.columns}
    assert sorted(table["year"]) == list(range(2000, 2000 + COUNT))
    for file, year, note in zip(table["image_path"], table["year"], table["note"], strict=True):
        assert (
            Path(file) == place / "images" / f"{year - 2000}.png"
            and note == f"größer {year - 2000}"
        )
    found = np.concatenate(arrays)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, by_open_clip(exported_tiny_clip, list(table["image_path"])), atol=1e-5
    )


def test_the_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert (
        main(["export-embeddings", str(place / "photos"), "--to", "empty", "--dtype", "float16"])
        == 0
    )
    assert capsys.readouterr().out == f"empty: {COUNT} embeddings\n"
    half = np.load("empty/img_emb/img_emb_0.npy")
    assert half.dtype == np.float16
    export_embeddings(place / "photos", Path("deep/whole"))
    np.testing.assert_allclose(half, np.load("deep/whole/img_emb/img_emb_0.npy"), atol=1e-3)
    Path("file").touch()
    for arguments, message in (
        (["nowhere", "--to", "new"], "no index at nowhere"),
        (
            [str(place / "photos"), "--to", "deep"],
            "deep holds something; give another folder with --to",
        ),
        ([str(place / "photos"), "--to", "file"], "file holds something"),
        ([str(place / "photos"), "--to", "file/new"], "could not write"),
    ):
        assert main(["export-embeddings", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error: ") == 1 and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "deep", "file"}


def test_a_full_disk_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(RAdapterError, match="could not write .*: No space left on device"):
        export_embeddings(place / "photos", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_too_small_for_the_embeddings_is_one_line(tmp_path: Path) -> None:
    write_numbers(tmp_path / "photos", range(100))
    vectors, texts = clustered(100, 32, 5)
    build(str(tmp_path / "photos"), tmp_path / "index", Ready(vectors, texts))
    with small_disk(tmp_path / "small", "64k") as disk:
        disk.fill(leave=3 * 4096)  # the embeddings take four such pages
        command = [
            sys.executable,
            "-m",
            "radapter_serve.cli.index",
            "export-embeddings",
            str(tmp_path / "index"),
        ]
        done = subprocess.run(
            [*command, "--to", str(disk.folder / "out")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stderr.count("error: ") == 1, (
            done
        )  # no signal of the kernel's
        assert "No space left on device" in done.stderr
        assert {path.name for path in disk.folder.iterdir()} == {"ballast"}


def test_a_column_that_would_be_taken_for_files_is_refused(
    place: Path, exported_tiny_clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos.csv").write_text(
        f"image,image_path\n{place}/images/0.png,elsewhere", encoding="utf-8"
    )
    build(
        f"csv:{tmp_path / 'photos.csv'}",
        tmp_path / "one",
        load_release(exported_tiny_clip / "model_repository"),
    )
    with pytest.raises(RAdapterError, match="has a column image_path"):
        export_embeddings(tmp_path / "one", tmp_path / "out")
