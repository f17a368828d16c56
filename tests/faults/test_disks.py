"""Real disks that are full or read-only: what is refused, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import build
from radapter_serve.index.index import open_index
from radapter_serve.release import adapters
from radapter_serve.release.adapters import AdapterFacts
from tests.helpers.small_disk import small_disk
from tests.helpers.small_release import photos_in


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_an_index_on_a_disk_that_fills(repository: Path, tmp_path: Path) -> None:
    photos = photos_in(tmp_path / "photos", 20, 120, 90)
    first, second = (load_release(f"{repository}@{number}") for number in (1, 2))
    with small_disk(tmp_path / "disk", "8m") as disk:
        index = disk.folder / "index"
        build(photos, index, second)
        before = contents(index)
        for leave in (0, 16 << 10):
            disk.fill(leave)
            with pytest.raises(RAdapterError, match="No space left on device") as error:
                build(photos, index, first, thumbnails=256)
            assert "\n" not in str(error.value)
            assert contents(index) == before
            disk.empty()
        build(photos, index, first, thumbnails=256, resume=False)
        assert {path.name for path in disk.folder.iterdir()} == {"index"}
        assert open_index(index).facts.plan.release.image_digest == first.release.image_digest


def test_an_adapter_on_a_disk_that_is_full(tmp_path: Path) -> None:
    facts = AdapterFacts(text_tower="sha256:" + "a" * 64, width=64, alpha=0.5)
    first, second = (number * np.eye(64, dtype=np.float32) for number in (1, 2))
    with small_disk(tmp_path / "disk", "1m") as disk:
        models = disk.folder / "models"
        models.mkdir()
        adapters.add(models, "anna", facts, (first,))
        before = contents(disk.folder)
        changes: list[Callable[[], object]] = [
            lambda: adapters.add(models, "anna", facts, (second,), replace=True),
            lambda: adapters.remove_adapter(models, "anna"),
        ]
        for leave in (0, 4 << 10, 20 << 10):
            disk.fill(leave)
            for change in changes[: 1 if leave else 2]:
                with pytest.raises(RAdapterError, match="adapters: No space left on dev") as error:
                    change()
                assert "\n" not in str(error.value)
            disk.empty()
            assert contents(disk.folder) == before
        changes[0]()
        entry = adapters.read_list(models)["anna"]
        assert adapters.load(models, "anna", entry).factors[0][0, 0] == 2


@pytest.mark.slow
def test_an_export_to_a_disk_that_fills_or_that_nobody_can_write(
    exported_tiny_clip: Path, quick: None, tmp_path: Path
) -> None:
    """It is refused in one line and leaves all files as they were, wherever it stopped."""
    from radapter_export import ExportSettings, export_release

    adapter = exported_tiny_clip / "adapter.safetensors"
    size = sum(len(data) for data in contents(exported_tiny_clip).values())
    with small_disk(tmp_path / "disk", f"{size // 2**20 + 8}m") as disk:
        settings = ExportSettings(
            model_repository=disk.folder / "models", merged=disk.folder / "merged"
        )
        export_release(adapter, [0.3], settings)
        before = contents(disk.folder)

        def is_refused(why: str) -> None:
            with pytest.raises(RAdapterError, match=f"(?i){why}") as error:
                export_release(adapter, [0.4], settings)
            assert "\n" not in str(error.value)

        for share in (0.0, 0.9):
            disk.fill(int(share * sum(len(data) for data in before.values())))
            is_refused("no space left on")
            disk.empty()
            assert contents(disk.folder) == before
        export_release(adapter, [0.4], settings)
        before = contents(disk.folder)
        disk.read_only()
        is_refused("read-only file system")
        assert contents(disk.folder) == before
