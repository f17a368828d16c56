"""`radapter-index build --ray` on a local Ray: the same rows as on this machine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from radapter_serve.cli.index import main
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index import writer
from radapter_serve.index.build import build
from radapter_serve.index.folder import FolderIndex, vectors_of
from tests.helpers.small_release import png

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # Ray's own
COUNT = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray in processes of its own, with two workers: a third core reads."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    ray.init(
        num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of images, to be embedded in batches of 8; one has the bytes of another."""
    monkeypatch.setattr(writer, "BATCH", 8)
    names = [f"{number}é.png" for number in range(COUNT - 2)] + ["it's 猫.png", "copy.png"]
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "photos" / name).write_bytes(png(0 if name == "copy.png" else number, 50, 40))
    rows = {"image": [f"photos/{name}" for name in names], "year": list(range(COUNT))}
    parquet.write_table(pa.table(rows), tmp_path / "table.parquet")
    return tmp_path


def rows_of(index: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    opened = FolderIndex(index)
    names = [*opened.facts.columns, "thumbnail", "vector"]
    table = pa.Table.from_batches(opened.rows(names, 100)).sort_by("path")
    return table.drop_columns(["vector"]).to_pylist(), vectors_of(table["vector"])


def test_rows_are_those_of_a_local_build(
    cluster: None, place: Path, exported_tiny_clip: Path
) -> None:
    release = load_release(exported_tiny_clip / "model_repository")
    source = f"parquet:{place / 'table.parquet'}"
    local = build(source, place / "here", release)
    spread = build(source, place / "there", release, ray="auto")
    assert (
        (spread.count, spread.embedded, spread.copies)
        == (local.count, local.embedded, local.copies)
        == (COUNT, COUNT - 1, 1)
    )
    rows, vectors = rows_of(place / "here")
    same, close = rows_of(place / "there")
    assert rows == same
    np.testing.assert_allclose(vectors, close, atol=1e-6)
    (place / "photos" / "1é.png").write_bytes(png(77, 50, 40))
    second_build = build(source, place / "there", release, ray="auto")
    assert (second_build.embedded, second_build.kept) == (1, COUNT - 1)


def test_a_killed_worker_costs_nothing(
    cluster: None, place: Path, exported_tiny_clip: Path
) -> None:
    release = load_release(exported_tiny_clip / "model_repository")
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        for process in psutil.Process().children(recursive=True):  # no other Ray's
            with contextlib.suppress(psutil.Error):
                if not killed and "_Worker" in " ".join(process.cmdline()):
                    killed.append(process.pid)
                    process.kill()

    summary = build(str(place / "photos"), place / "index", release, ray="auto", progress=kill)
    assert killed and summary.count == COUNT
    build(str(place / "photos"), place / "here", release)
    np.testing.assert_allclose(rows_of(place / "index")[1], rows_of(place / "here")[1], atol=1e-6)


def test_images_that_cannot_be_read_are_named(
    cluster: None, place: Path, exported_tiny_clip: Path
) -> None:
    release = load_release(exported_tiny_clip / "model_repository")
    (place / "photos" / "bad.png").write_bytes(b"no image")
    (place / "photos" / "gone.png").symlink_to(place / "nowhere")
    source = str(place / "photos")
    with pytest.raises(RAdapterError, match="'bad.png' can't be indexed.*--on-broken skip"):
        build(source, place / "index", release, ray="auto")
    summary = build(source, place / "index", release, ray="auto", on_broken="skip")
    assert summary.count == COUNT and set(summary.broken) == {"bad.png", "gone.png"}
    moved = load_release(shutil.copytree(exported_tiny_clip / "model_repository", place / "models"))
    shutil.rmtree(place / "models")
    with pytest.raises(RAdapterError, match="the cluster can't embed") as error:
        build(source, place / "other", moved, ray="auto")
    assert "\n" not in str(error.value)


def test_a_missing_cluster_is_an_error_of_one_line(
    place: Path,
    exported_tiny_clip: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", Mock(side_effect=ConnectionError("Could not find any")))
    models = str(exported_tiny_clip / "model_repository")
    where = ["--out", str(place / "i"), "--model-repository", models]
    assert main(["build", str(place / "photos"), *where, "--ray", "auto"]) == 2
    assert "no Ray cluster at auto" in capsys.readouterr().err and not (place / "i").exists()
