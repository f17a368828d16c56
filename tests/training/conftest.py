"""A small image folder of three classes that differ in colour, and runs in two processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from radapter_serve.training import Recipe

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


@pytest.fixture
def train_in_two_processes(tmp_path: Path) -> Callable[[Recipe, Path], None]:
    """Trains by the command, in two processes, into a folder."""

    def run(recipe: Recipe, out: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict()))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "radapter_serve.cli.train", "--recipe", str(path), "--out", str(out)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, output[-3000:]
        assert "in 2 processes" in output

    return run
