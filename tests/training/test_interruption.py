"""Runs that are told to end: by Ctrl-C, by SIGTERM; and going on from the run's folder alone."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture
def signal_after(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[int, signal.Signals], None]]:
    """Sends a signal to this process in the middle of a step; what a shell starts behind itself
    ignores Ctrl-C.
    """
    update = Average.update
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def arm(step: int, number: signal.Signals) -> None:
        def send(self: Average) -> None:
            if self.steps == step - 1:
                os.kill(os.getpid(), number)
            update(self)

        monkeypatch.setattr(Average, "update", send)

    yield arm
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_run_that_is_told_to_end_goes_on_from_its_folder_alone(
    recipe: Recipe,
    tmp_path: Path,
    signal_after: Callable[[int, signal.Signals], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    ending: type[BaseException],
) -> None:
    whole = load_adapter(train(recipe))
    cut = dataclasses.replace(recipe, out=tmp_path / "cut")
    before = signal.getsignal(number)
    signal_after(5, number)
    with pytest.raises(ending) as raised:
        train(cut, progress=True)
    assert ending is KeyboardInterrupt or raised.value.code == 143  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before
    assert {path.name for path in cut.out.iterdir()} == {  # type: ignore[union-attr]
        "checkpoint.pt",
        "metrics.jsonl",
        "recipe.yaml",
    }
    assert len(rows(tmp_path / "cut")) == 5
    printed = capsys.readouterr().out
    assert (
        "saved a checkpoint after step 5; continue with radapter-train --resume"
        in printed.replace("\n", " ")
    )
    monkeypatch.undo()
    assert main(["--resume", str(cut.out)]) == 0
    resumed = load_adapter(cut.out)  # type: ignore[arg-type]
    assert len([row for row in rows(tmp_path / "cut") if "loss" in row]) == 8
    for name, value in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], value, rtol=0, atol=1e-7)


def test_the_other_ways_to_name_the_run(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(
        "radapter_serve.training.start.train", lambda recipe, **_: asked.append(recipe)
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    for arguments in (
        ["--resume", "--out", str(run)],
        [f"--resume={run}"],
        ["--resume", str(run), "--workers", "1"],
    ):
        assert main(arguments) == 0
        expected = dataclasses.replace(
            recipe, out=run, resume=True, workers=int("--workers" in arguments)
        )
        assert asked.pop() == expected
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
    path.write_text(
        yaml.safe_dump({**recipe.to_dict(), "workers": 2, "steps": 100_000, "warmup_steps": 5})
    )
    command = [
        sys.executable,
        "-m",
        "radapter_serve.cli.train",
        "--recipe",
        str(path),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in errors, errors
    assert (out / "checkpoint.pt").is_file()
