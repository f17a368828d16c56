"""Whole runs on a tiny model: they learn, stop, go on to the same result, and say what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from radapter_serve.adapter import Adapter, load_adapter
from radapter_serve.cli.train import main
from radapter_serve.clip.base import Base, load_base
from radapter_serve.errors import RAdapterError, in_words
from radapter_serve.training import Average, Recipe, choose_form, train, validation
from radapter_serve.training.data import open_run
from radapter_serve.training.progress import Interruption
from radapter_serve.training.setup import build
from radapter_serve.training.validation import validate
from tests.helpers.by_hand import assert_same
from tests.helpers.short_run import rows, short_run
from tests.helpers.small_models import make_base
from tests.training.test_several_labels import several
from tests.training.test_wiring import FIELDS, captioned

# A process in a group of its own, whose words come together.
GROUP: dict[str, Any] = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "start_new_session": True,
}


@pytest.fixture
def recipe(tiny_clip_dir: str, images: Path, tmp_path: Path) -> Recipe:
    data = f"imagefolder:{images}"
    return short_run(tiny_clip_dir, tmp_path, data=data, val_data=data)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


def test_a_run_learns_and_leaves_what_it_says(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bases = []

    def load(*arguments: Any, **fields: Any) -> Base:
        bases.append(load_base(*arguments, **fields))
        return bases[-1]

    monkeypatch.setattr("radapter_serve.training.setup.load_base", load)
    recipe = dataclasses.replace(recipe, steps=30, validate_every=10, tracker="tensorboard")
    out = train(recipe, progress=True).folder
    assert len(losses(out)) == 30 and sum(losses(out)[-5:]) < 0.8 * sum(losses(out)[:5])
    accuracies = [row["acc1@alpha=1"] for row in rows(out) if "acc1@alpha=1" in row]
    assert len(accuracies) == 3 and accuracies[-1] == 1.0  # three plain colours
    metadata = load_adapter(out).metadata
    assert metadata.metrics["acc1@alpha=1"] == 1.0
    assert metadata.classes == ["blue", "green", "red"]
    stored_recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert metadata.recipe == stored_recipe == recipe.to_dict()
    files = {"adapter.safetensors", "checkpoint.pt", "metrics.jsonl", "recipe.yaml"}
    assert {path.name for path in out.iterdir()} == {*files, "radapter"}
    assert list((out / "radapter").rglob("events*"))
    printed = capsys.readouterr().out
    for words in (
        "% of the base's",
        "s left",
        "takes about",
        "; the projection",
        "next: radapter-eval",
    ):
        assert words in printed
    # The base stays to the bit.
    expected = load_base(recipe.architecture).model.state_dict()
    torch.testing.assert_close(bases[0].model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("ctrl_c")
def test_a_run_that_is_stopped_is_resumed_to_the_same_result(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields: dict[str, Any] = {"accumulate": 2, "flip": True, "rank": 2, "bias_correction": True}
    recipe = dataclasses.replace(recipe, val_data=None, **fields)
    expected = load_adapter(train(recipe)).tensors
    update = Average.update

    def stopped(out: Path, save_every: int | None, stop: Callable[[], object]) -> BaseException:
        """Train, and stop in the middle of the seventh step."""

        def update_or_stop(self: Average) -> None:
            if self.steps == 6:
                stop()
            update(self)

        with monkeypatch.context() as patch, pytest.raises(BaseException) as error:
            patch.setattr(Average, "update", update_or_stop)
            train(dataclasses.replace(recipe, out=out, save_every=save_every), progress=True)
        return error.value

    def kill() -> None:
        raise SystemError

    # A run that is killed goes on from its last checkpoint, after the fourth step.
    killed = tmp_path / "killed"
    assert isinstance(stopped(killed, 4, kill), SystemError)
    assert not (killed / "adapter.safetensors").exists()
    resumed = load_adapter(train(dataclasses.replace(recipe, out=killed, resume=True)))
    torch.testing.assert_close(resumed.tensors, expected, rtol=0, atol=1e-7)

    # A run that gets a signal saves a checkpoint, from which its folder alone goes on.
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / f"the {number.name}"
        error = stopped(folder, None, functools.partial(os.kill, os.getpid(), number))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if number == signal.SIGTERM:
            assert isinstance(error, SystemExit) and error.code == 143
    assert isinstance(error, KeyboardInterrupt)
    files = {path.name for path in folder.iterdir()}
    assert files == {"checkpoint.pt", "metrics.jsonl", "recipe.yaml"}
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"after step 7; continue with radapter-train --resume '{folder}'" in printed
    assert main(["--resume", str(folder)]) == 0
    assert len(losses(folder)) == 8
    torch.testing.assert_close(load_adapter(folder).tensors, expected, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("ctrl_c")  # a shell's background job ignores it
def test_a_second_signal_ends_at_once() -> None:
    lines: list[str] = []
    with Interruption(lines.append):
        signal.raise_signal(signal.SIGINT)  # at once, though other threads run
        assert len(lines) == 1 and "press Ctrl-C again to quit now" in lines[0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(lines) == 1


def test_times_are_written_in_words() -> None:
    for seconds, words in ((1.2, "1 second"), (100, "100 seconds"), (170, "3 minutes")):
        assert in_words(seconds) == words
    assert in_words(2 * 3600) == "2 hours"


def test_bf16_trains_to_nearly_the_same_adapter(recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, val_data=None)
    plain = load_adapter(train(recipe)).tensors
    half = dataclasses.replace(recipe, precision="bf16", out=tmp_path / "bf16")
    for name, value in load_adapter(train(half)).tensors.items():
        assert value.dtype == torch.float32 and not torch.equal(value, plain[name])
        assert F.cosine_similarity(value.flatten(), plain[name].flatten(), dim=0) > 0.9


def train_in_two_processes(recipe: Recipe, folder: Path) -> Adapter:
    """Train by the command, in two processes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "radapter_serve.cli.train", "--recipe", str(path), "--out", str(folder / "two")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, text=True, env=environment, **GROUP)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    assert "in 2 processes" in output
    return load_adapter(folder / "two")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_two_processes_train_to_the_same_adapter_as_one(
    task: str, tiny_clip_dir: str, tmp_path: Path, with_captions: Recipe
) -> None:
    """11 images, no multiple of the batch nor of the processes, some with more labels."""
    recipe = dataclasses.replace(with_captions, captions_per_image=2)
    if task == "classification":
        data, _ = several(tmp_path / "several", "text")
        fields = {**FIELDS, "label_separator": ";", "negative_classes": 2}
        recipe = short_run(tiny_clip_dir, tmp_path, data=data, **fields)
    expected = load_adapter(train(recipe))
    adapter = train_in_two_processes(recipe, tmp_path)
    assert adapter.metadata.metrics == expected.metadata.metrics
    assert_same(adapter.tensors, expected.tensors)


def test_the_form_follows_the_batch(tiny_clip_dir: str) -> None:
    model = load_base(tiny_clip_dir).model
    assert choose_form(model, None, 4) == "activation"
    assert choose_form(model, None, 4096) == "weight"
    assert choose_form(model, 4, 4096) == "activation"


@pytest.fixture
def refused(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The one line that the command prints for the recipe with some flags, or another recipe."""

    def call(*flags: str, text: str | None = None) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text or yaml.safe_dump(recipe.to_dict()))
        assert main(["--recipe", str(path), *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("radapter-train: error: ") and error.count("\n") == 1
        return error

    return call


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_bad_input_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    for flags, message in (
        ("--architecture ViT-X-1", "unknown model 'ViT-X-1'"),
        ("--resume", "--resume needs --out"),
        (f"--resume --out {tmp_path}/run", "no checkpoint"),
        ("--tracker wanbd", "tracker 'wanbd'"),
        (f"--tracker comet_ml --out {tmp_path}/run", "tracker comet_ml is not installed"),
    ):
        assert message in refused(*flags.split())
    assert "unknown fields learning_rat" in refused(text="learning_rat: 1\n")
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_an_error_of_one_line_with_workers(
    recipe: Recipe,
    images: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (images / "red" / "0.png").write_bytes(b"no image")
    flags = ["--val-data", "none", "--workers", "2", "--out", str(tmp_path / "skipped")]
    assert "red/0.png can't be read" in refused(*flags)
    assert main(["--recipe", str(tmp_path / "recipe.yaml"), *flags, "--on-broken", "skip"]) == 0
    assert "left out 1 broken image" in capsys.readouterr().out
    assert "red/0.png" in (tmp_path / "skipped" / "broken.txt").read_text()


def test_an_image_that_breaks_before_validation(recipe: Recipe, images: Path) -> None:
    learner = build(recipe, open_run(recipe), images)
    (images / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(RAdapterError, match=r"red/0\.png can't be read"):
        validate(learner)
    learner.examples.refuse = False
    embedded = [len(rows) for rows, _ in validation._embedded(learner, [1.0])]
    assert embedded == [23] and validate(learner).keys() == {"acc1@alpha=0.5", "acc1@alpha=1"}
    with torch.no_grad():
        learner.base.model.get_parameter("visual.proj")[0, 0] = torch.nan
    with pytest.raises(RAdapterError, match="not finite"):
        validate(learner)


def test_a_finished_run_is_kept_when_it_is_resumed_and_not_overwritten(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe)
    before = load_adapter(run)
    after = load_adapter(train(dataclasses.replace(recipe, resume=True), progress=True))
    printed = capsys.readouterr().out
    assert f"{recipe.out} was finished already, after step 8 of 8; this trains nothing" in printed
    assert "steps of 8 images" not in printed and "images/s" not in printed
    assert after.metadata.metrics == before.metadata.metrics and before.metadata.metrics
    assert after.digest == before.digest and len(losses(run.folder)) == 8

    with pytest.raises(RAdapterError, match="holds a run; resume it with --resume"):
        train(recipe)
    with pytest.raises(RAdapterError, match="delta was 0.05, is 0.1"):
        train(dataclasses.replace(recipe, resume=True, delta=0.1))
    (run.folder / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(RAdapterError, match="is not a whole checkpoint"):
        train(dataclasses.replace(recipe, resume=True))


def test_a_full_disk_in_the_middle_of_a_run(
    recipe: Recipe, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    assert recipe.out is not None
    assert "No space left on device" in refused("--out", str(recipe.out))
    assert {path.name for path in recipe.out.iterdir()} == {"recipe.yaml", "metrics.jsonl"}


@pytest.mark.slow
def test_a_signal_to_the_whole_group_with_workers(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    out = tmp_path / "group"
    fields: dict[str, Any] = {"workers": 2, "steps": 100_000, "save_every": None}
    path.write_text(yaml.safe_dump(recipe.to_dict() | fields))
    arguments = ["-m", "radapter_serve.cli.train", "--recipe", str(path), "--out", str(out)]
    process = subprocess.Popen([sys.executable, *arguments], text=True, **GROUP)
    try:
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in output, output
    assert (out / "checkpoint.pt").is_file()


@pytest.fixture
def with_captions(tiny_clip_dir: str, tmp_path: Path) -> Recipe:
    """16 images with 40 captions, as rows."""
    data, _ = captioned(tmp_path / "data", 16, seed=1)
    return short_run(tiny_clip_dir, tmp_path, task="retrieval", data=data, val_data=data)


def test_broken_images_and_rows_without_captions(with_captions: Recipe, tmp_path: Path) -> None:
    (tmp_path / "data" / "0.png").write_bytes(b"no image")
    with (tmp_path / "data" / "rows.csv").open("a") as file:
        file.write("1.png,\n")
    with pytest.raises(RAdapterError, match=r"row 41 of .* has no text in 'caption'"):
        train(with_captions)
    run = train(dataclasses.replace(with_captions, on_broken="skip"))
    broken = (run.folder / "broken.txt").read_text()
    assert "0.png can't be read: 8 bytes are not an image\n" in broken and "row 41 of" in broken
    assert run.metrics  # the broken image is in the validation data too


def test_adapters_of_one_tower_alone(tiny_clip_dir: str, images: Path, tmp_path: Path) -> None:
    data = f"imagefolder:{images}"
    fields: dict[str, Any] = {"data": data, "steps": 1, "warmup_steps": 0}
    run = train(short_run(tiny_clip_dir, tmp_path, adapt="image-tower", **fields))
    assert all(key.startswith("visual.") for key in load_adapter(run).keys)
    # The convolutional image tower can't be adapted.
    name = make_base("resnet", tmp_path / "base")
    partly = short_run(name, tmp_path / "partly", partial=True, **fields)
    with pytest.raises(RAdapterError, match=r"image tower .*ModifiedResNet.*--partial"):
        train(dataclasses.replace(partly, partial=False))
    assert partly.out is not None and not partly.out.exists()
    adapter = load_adapter(train(partly))
    assert {key.split(".")[0] for key in adapter.keys} == {"transformer"}
    assert adapter.metadata.recipe["partial"] is True
