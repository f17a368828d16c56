"""A release turns images by EXIF orientation as the training of its adapter did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radapter_export import ExportSettings, export_release
from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.runtimes.local_release import LocalRelease


@pytest.mark.parametrize(("recipe", "turns"), [({}, True), ({"exif_orientation": False}, False)])
def test_a_release_turns_images_as_training_did(
    recipe: dict[str, Any], turns: bool, quick: None, random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(random_adapter(scale=0.05, recipe=recipe), path)
    settings = ExportSettings(model_repository=tmp_path / "models", merged=tmp_path / "merged")
    (release,) = export_release(path, None, settings)
    assert release.facts["preprocess"]["exif_orientation"] is turns
    assert LocalRelease(tmp_path / "models").preprocess.exif_orientation is turns
