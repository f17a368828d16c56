from __future__ import annotations

from pathlib import Path

import pytest
from small_release import Local, write_release


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "model_repository"
    write_release(folder, 1, seed=1, dense=False)
    write_release(folder, 2, seed=2)
    return folder


@pytest.fixture
def local(repository) -> Local:
    return Local(repository, 2)
