"""Disks that are full or read-only, on real ones: what is refused, what goes on, and what is left
behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.index.index import open_index
from tests.helpers.small_disk import small_disk
from tests.helpers.small_release import photos_in

if TYPE_CHECKING:
    from radapter_serve.adapter import Adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("leave", [0, 16 << 10, 64 << 10])
def test_an_index_on_a_disk_that_fills(repository: Path, tmp_path: Path, leave: int) -> None:
    """A build that fills the disk is refused in one line; the index of before is whole, and space
    mends it all.
    """
    release = load_release(f"{repository}@2")
    photos = photos_in(tmp_path / "photos", 40, 120, 90)
    with small_disk(tmp_path / "disk", "8m") as disk:
        index = disk.folder / "index"
        build(photos, index, release)
        before = contents(index)
        disk.fill(leave)
        with pytest.raises(RAdapterError, match="No space left on device") as error:
            build(photos, index, load_release(f"{repository}@1"), thumbnails=256)
        assert "\n" not in str(error.value)
        assert contents(index) == before
        disk.empty()
        build(photos, index, load_release(f"{repository}@1"), thumbnails=256, resume=False)
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
