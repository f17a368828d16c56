"""A small image folder of three classes that differ in colour."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 40), "red": (220, 30, 30)}


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("coloured")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for index in range(8):
            noise = generator.integers(-30, 30, (36, 40, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def images(coloured: Path, tmp_path: Path) -> Path:
    """8 PNG files of 40 by 36 pixels for each of three classes, in one sub-folder a class."""
    return shutil.copytree(coloured, tmp_path / "images")
