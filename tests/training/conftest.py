"""A small image folder: three classes that differ in colour; runs that are cut, runs in two
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from radapter_serve.adapter import load_adapter
from radapter_serve.training import Average, Recipe, train
from tests.helpers.own_cache import own_cache as own_cache

COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 40), "red": (220, 30, 30)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """8 PNG files of 40 by 36 pixels for each of three classes, in one sub-folder a class."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(8):
            noise = generator.integers(-30, 30, (36, 40, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def assert_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Recipe, int], None]:
    """Checks that a run that is killed after a step, and resumed, ends with the adapter of the
    whole run.
    """
    update = Average.update

    def check(recipe: Recipe, steps: int) -> None:
        def die(self: Average) -> None:
            update(self)
            if self.steps == steps:
                raise KeyboardInterrupt

        whole = load_adapter(train(recipe))
        cut = dataclasses.replace(recipe, out=tmp_path / "cut")
        with monkeypatch.context() as patch:
            patch.setattr(Average, "update", die)
            with pytest.raises(KeyboardInterrupt):
                train(cut)
        assert not (tmp_path / "cut" / "adapter.safetensors").exists()
        resumed = load_adapter(train(dataclasses.replace(cut, resume=True)))
        torch.testing.assert_close(resumed.tensors, whole.tensors, rtol=0, atol=1e-7)

    return check


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
