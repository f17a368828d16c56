"""The stand-in models of fake_model.py, for a real tritonserver."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radapter_export.repository import TEMPLATE, config, sources
from radapter_serve.release.release import TASKS, Release
from tests.helpers.small_models import release as facts


def release(version: int) -> dict[str, Any]:
    """The release.json of one version."""
    created = "2026-01-01T00:00:00+00:00"
    return facts(version, alpha=0.5 * version, embed_dim=4, created=created).to_dict()


def write_repository(folder: Path, versions: Sequence[int]) -> Path:
    """Writes the task models in these versions, with the exporter's own configurations."""
    releases = [Release.from_dict(release(version)) for version in versions]
    for name in TASKS:
        for version in versions:
            (folder / name / str(version)).mkdir(parents=True)
            model = Path(__file__).with_name("fake_model.py")
            shutil.copy(model, folder / name / str(version) / "model.py")
        text = config(sources() / name / TEMPLATE, name, releases)
        (folder / name / "config.pbtxt").write_text(text)
    return folder
