"""Disks that are full or read-only, on real ones: what is refused, what goes on, and what is left
behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from radapter_client import Client
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.index.index import open_index
from radapter_serve.runtimes.local_release import LocalRelease
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.processes import FOLDER_PREFIX, shm_prefix
from radapter_serve.server.triton_server import TritonServer
from tests.faults.conftest import outcome
from tests.helpers.fake_server import FakeServer
from tests.helpers.small_disk import small_disk

if TYPE_CHECKING:
    from radapter_serve.adapter import Adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    from tests.helpers.small_release import png

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.png").write_bytes(png(number, 120, 90))
    return folder


@pytest.mark.parametrize("leave", [0, 16 << 10, 64 << 10])
def test_an_index_on_a_disk_that_fills(
    repository: Path, photos: Path, tmp_path: Path, leave: int
) -> None:
    """A build that fills the disk is refused in one line; the index of before is whole, and space
    mends it all.
    """
    release = LocalRelease(f"{repository}@2")
    with small_disk(tmp_path / "disk", "8m") as disk:
        index = disk.folder / "index"
        build(str(photos), index, release)
        before = contents(index)
        disk.fill(leave)
        with pytest.raises(RAdapterError, match="No space left on device") as error:
            build(str(photos), index, LocalRelease(f"{repository}@1"), thumbnails=256)
        assert "\n" not in str(error.value)
        assert contents(index) == before
        disk.empty()
        build(str(photos), index, LocalRelease(f"{repository}@1"), thumbnails=256, resume=False)
        assert {path.name for path in disk.folder.iterdir()} == {"index"}
        assert open_index(index).facts.plan.release.digest


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_an_export_to_a_disk_that_fills(
    exported_tiny_clip: Path,
    random_adapter: Callable[..., Adapter],
    quick: None,
    tmp_path: Path,
    share: float,
) -> None:
    """An export that fills the disk is refused in one line and leaves all files as they were,
    wherever it stopped.
    """
    from radapter_export import ExportSettings, export_release
    from radapter_serve.adapter import save_adapter

    save_adapter(random_adapter(scale=0.05), tmp_path / "adapter.safetensors")
    size = sum(len(data) for data in contents(exported_tiny_clip).values())
    with small_disk(tmp_path / "disk", f"{size // 2**20 + 8}m") as disk:
        settings = ExportSettings(
            model_repository=disk.folder / "models", merged=disk.folder / "merged"
        )
        export_release(tmp_path / "adapter.safetensors", [0.3], settings)
        before = contents(disk.folder)
        disk.fill(int(share * sum(len(data) for data in before.values())))
        with pytest.raises(RAdapterError, match="(?i)no space left on") as error:
            export_release(tmp_path / "adapter.safetensors", [0.4], settings)
        assert "\n" not in str(error.value)
        disk.empty()
        assert contents(disk.folder) == before
        export_release(tmp_path / "adapter.safetensors", [0.4], settings)


def test_an_export_to_a_disk_that_nobody_can_write(
    exported_tiny_clip: Path, quick: None, tmp_path: Path
) -> None:
    """An export into a read-only repository is refused in one line."""
    from radapter_export import ExportSettings, export_release

    with small_disk(tmp_path / "disk", "64m") as disk:
        disk.read_only()
        settings = ExportSettings(
            model_repository=disk.folder / "models", merged=disk.folder / "merged"
        )
        with pytest.raises(RAdapterError, match="(?i)read-only file system") as error:
            export_release(exported_tiny_clip / "adapter.safetensors", [0.3], settings)
        assert "\n" not in str(error.value)


@pytest.mark.triton
def test_a_repository_that_nobody_can_write(stand_ins: Path, tmp_path: Path) -> None:
    """A server needs no right to write its repository: it starts, answers and stops on a read-only
    one.
    """
    with small_disk(tmp_path / "disk", "16m") as disk:
        shutil.copytree(stand_ins, disk.folder / "repository")
        disk.read_only()
        with FakeServer(disk.folder / "repository") as server, Client(server.grpc_url) as client:
            assert outcome(partial(client.classify, b"x", ["a"])) == "an answer"


def left_by(folder: Path) -> list[Path]:
    """What a server whose folder is gone has left in /dev/shm and beside it."""
    return [
        *Path("/dev/shm").glob(f"{shm_prefix(folder)}*"),
        *folder.parent.glob(f"{FOLDER_PREFIX}*"),
    ]


@pytest.mark.triton
def test_a_temporary_folder_that_is_full(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the start: refused with what to do, nothing left. Full later: calls go on, and it
    stops in order.
    """
    with small_disk(tmp_path / "disk", "64m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
        disk.fill(16 << 10)
        with pytest.raises(
            RAdapterError, match=r"cannot write into .*No space left on device.*set TMPDIR"
        ):
            TritonServer(ServerConfig(stand_ins, Endpoints.on_free_ports())).start()
        disk.empty()
        assert not list(disk.folder.iterdir())
        with FakeServer(stand_ins) as server:
            folder = server.folder
            disk.fill()
            for url in server.urls.values():
                with Client(url) as client:
                    assert outcome(partial(client.classify, b"x" * 100_000, ["a"])) == "an answer"
                    assert (
                        outcome(partial(client.classify, b'{"error": "[no_labels] x"}', ["a"]))
                        != "an answer"
                    )
        disk.empty()
        assert left_by(folder) == []


@pytest.mark.triton
def test_two_servers_on_one_repository(running: FakeServer, stand_ins: Path) -> None:
    """Two servers share a repository; the end of one harms the other in nothing. A port that is
    taken is named.
    """

    def ask(server: Any) -> str:
        with Client(server.grpc_url) as client:
            return outcome(partial(client.classify, b"x", ["a"]))

    with FakeServer(stand_ins) as second:
        assert ask(running) == ask(second) == "an answer"
        folder = second.folder
        taken = running.endpoints.http_port
        endpoints = replace(Endpoints.on_free_ports(), http_port=taken)
        with pytest.raises(RAdapterError, match=f"port {taken}: .*choose another with --http-port"):
            TritonServer(ServerConfig(stand_ins, endpoints)).start()
    assert ask(running) == "an answer"
    assert not folder.exists() and not list(Path("/dev/shm").glob(f"{shm_prefix(folder)}*"))
