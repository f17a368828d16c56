"""Broken releases and disks, under each way to serve: what is refused, and what goes on."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest

from radapter_client import Client
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import Served
from radapter_serve.server.launch import FOLDER_PREFIX, shm_prefix
from tests.faults.conftest import ask
from tests.helpers.small_disk import small_disk
from tests.helpers.small_release import png, seal
from tests.helpers.ways import WAYS

each_way = pytest.mark.parametrize(
    "way",
    [pytest.param("triton", marks=pytest.mark.triton), "process"],
)


def release_at(url: str) -> int:
    """The release that answers good calls."""
    with Client(url, timeout=60) as client:
        client.embed_texts(["a"])
        return client.classify(png(0), ["a"]).release


@each_way
def test_a_damaged_release_leaves_the_present_one(releases: Path, tmp_path: Path, way: str) -> None:
    repository = shutil.copytree(releases, tmp_path / "models")
    graph, other = (
        (repository / "image_encoder" / version / "model.onnx").read_bytes() for version in "12"
    )
    # A file, what it holds instead, whether the digests are those of what it holds, and what the
    # refusal names
    damages: list[tuple[str, bytes | None, bool, str]] = [
        ("image_encoder/1/model.onnx", graph[:-9], False, "image_encoder"),
        ("embed_text/1/tokenizer.json", None, False, "tokenizer.json"),
        ("text_encoder/1/model.onnx", b"no graph", True, "text_encoder"),
        ("image_encoder/1/model.onnx", other, True, "differs from torch"),
    ]
    with WAYS[way](repository, tmp_path / "indexes") as running:
        for file, content, is_sealed, named in damages:
            path = repository / file
            before = path.read_bytes()
            path.unlink() if content is None else path.write_bytes(content)
            if is_sealed:
                seal(repository, 1)
            with pytest.raises(RAdapterError) as error:
                running.server.load([1], lambda line: None)
            message = str(error.value)
            assert "release 1 was not loaded, and release 2 is served as before: " in message
            assert named in message and "\n" not in message, file
            assert release_at(running.url) == 2
            path.write_bytes(before)
            seal(repository, 1)
        assert running.server.load([1], lambda line: None) == "release 1 is served"
        assert release_at(running.url) == 1


@each_way
def test_a_repository_that_is_full_or_that_nobody_can_write(
    releases: Path, tmp_path: Path, way: str
) -> None:
    """A server needs no right to write its repository; a choice then holds until it ends."""
    with small_disk(tmp_path / "disk", "64m") as disk:
        repository = shutil.copytree(releases, disk.folder / "models")
        disk.fill()
        with WAYS[way](repository, tmp_path / "indexes") as running:
            said = running.server.load([1], lambda line: None)
            assert "release 1 is served, until the server ends" in said
            assert "No space left on device" in said
            assert release_at(running.url) == 1
            disk.read_only()
            said = running.server.rollback(lambda line: None)
            assert "release 2 is served, until the server ends" in said
            assert "Read-only file system" in said
            assert release_at(running.url) == 2
        assert Served.load(repository).releases == (2,)
        with WAYS[way](repository, tmp_path / "indexes") as running:
            assert release_at(running.url) == 2


@each_way
def test_a_temporary_folder_that_is_full(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
        monkeypatch.setenv("TMPDIR", str(disk.folder))
        indexes = tmp_path / "indexes"
        disk.fill()
        with contextlib.ExitStack() as stack:
            if way != "process":  # which writes nothing there
                refused = r"cannot write into .*No space left on.*set TMPDIR"
                stack.enter_context(pytest.raises(RAdapterError, match=refused))
            stack.enter_context(WAYS[way](releases, indexes))
        disk.empty()
        assert not list(disk.folder.iterdir())
        with WAYS[way](releases, indexes) as running:
            disk.fill()
            for _ in range(3):
                assert release_at(running.url) == 2
            with Client(running.url) as client:
                assert ask(client) == "InvalidImage invalid_image"
        disk.empty()
        assert not list(Path("/dev/shm").glob(f"{shm_prefix(running.folder)}*"))
        assert not list(disk.folder.glob(f"{FOLDER_PREFIX}*"))
