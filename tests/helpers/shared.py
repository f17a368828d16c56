"""Folders that take long to fill, once in a test run: by the worker that asks first, for all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def common_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers of this run have in common."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common"
    folder.mkdir(exist_ok=True)
    return folder


def shared(common: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A folder in the common one that every worker reads, and that no test may change; `make` fills
    it, and workers that ask meanwhile wait for that.
    """
    folder = common / name
    marker = common / f"{name}.made"
    with FileLock(common / f"{name}.lock"):
        if not marker.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another worker failed at it
            folder.mkdir()
            make(folder)
            marker.touch()
    return folder
