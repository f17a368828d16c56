"""Runs that are stopped, by Ctrl-C and by SIGTERM, and resumed from their folder alone."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from radapter_serve.adapter import load_adapter
from radapter_serve.cli.train import main
from radapter_serve.training import Average, Recipe, train
from tests.helpers.short_run import rows, short_run


@pytest.fixture
def recipe(tiny_clip_dir: str, images: Path, tmp_path: Path) -> Recipe:
    return short_run(
        tiny_clip_dir, tmp_path, data=f"imagefolder:{images}", save_every=None, tracker="none"
    )


@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_run_that_is_stopped_is_resumed_from_its_folder_alone(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    ending: type[BaseException],
) -> None:
    whole = load_adapter(train(recipe))
    cut = tmp_path / "cut"
    update = Average.update

    def send(self: Average) -> None:
        if self.steps == 4:  # in the middle of the fifth step
            os.kill(os.getpid(), number)
        update(self)

    # What a shell starts in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(ending) as error:
            patch.setattr(Average, "update", send)
            train(dataclasses.replace(recipe, out=cut), progress=True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ending is KeyboardInterrupt or error.value.code == 143  # type: ignore[attr-defined]
    assert {path.name for path in cut.iterdir()} == {
        "checkpoint.pt",
        "metrics.jsonl",
        "recipe.yaml",
    }
    assert len(rows(cut)) == 5
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "saved a checkpoint after step 5; continue with radapter-train --resume" in printed
    assert main(["--resume", str(cut)]) == 0
    resumed = load_adapter(cut)
    assert len([row for row in rows(cut) if "loss" in row]) == 8
    torch.testing.assert_close(resumed.tensors, whole.tensors, rtol=0, atol=1e-7)


def test_the_other_ways_to_name_the_run(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr(
        "radapter_serve.training.start.train", lambda recipe, **_: recipes.append(recipe)
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    for arguments, workers in (
        (["--resume", "--out", str(run)], 0),
        ([f"--resume={run}"], 0),
        (["--resume", str(run), "--workers", "1"], 1),
    ):
        assert main(arguments) == 0
        expected = dataclasses.replace(recipe, out=run, resume=True, workers=workers)
        assert recipes.pop() == expected
    assert main(["--resume", str(tmp_path / "none")]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert main(["--resume", "--data", "csv:t.csv"]) == 2
    assert "--resume needs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_with_workers(
    recipe: Recipe, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    path = tmp_path / "recipe.yaml"
    out = tmp_path / "group"
    fields = {**recipe.to_dict(), "workers": 2, "steps": 100_000, "warmup_steps": 5}
    path.write_text(yaml.safe_dump(fields))
    arguments = ["-m", "radapter_serve.cli.train", "--recipe", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in errors, errors
    assert (out / "checkpoint.pt").is_file()
