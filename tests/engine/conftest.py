"""A small release with all five tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from radapter_serve.release.release import TASKS
from tests.helpers.shared import shared


@pytest.fixture(scope="session")
def repository(common: Path) -> Path:
    def make(folder: Path) -> None:
        from tests.helpers.small_release import write_release

        write_release(folder, 1, seed=1, dense=False, tasks=TASKS)
        write_release(folder, 2, seed=2, tasks=TASKS)

    return shared(common, "whole-release", make)
