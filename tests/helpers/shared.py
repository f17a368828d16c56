"""What takes long to make is made once in a test run: by the worker that asks for it first, for all of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that every worker of this run reads, and that no test may change.

    Args:
        factory: knows the folder of this run.
        name: of the folder to make.
        make: fills the folder. Workers that ask meanwhile wait for it.
    """
    own = factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    root.mkdir(exist_ok=True)
    folder, made = root / name, root / f"{name}.made"
    with FileLock(root / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another worker failed at it
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
