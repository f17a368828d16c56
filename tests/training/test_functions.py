"""`train` and `evaluate` as functions: they give what the commands give, and print nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radapter_serve import RAdapterError, evaluate, load_adapter, train
from radapter_serve.cli.train import main as train_command
from tests.helpers.short_run import COMMON, short_run
from tests.helpers.walks import check_walk

FIELDS = COMMON | {"steps": 4, "preserve_words": 0.0, "seed": 3}


def test_training_gives_what_the_command_gives_and_prints_where_it_is_asked(
    tiny_clip_dir: str,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # As if stderr were a terminal, so that there is progress to show at once, if it is shown.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.chdir(images.parent)
    run = train(
        recipe="small",
        architecture=tiny_clip_dir,
        pretrained=None,
        data="imagefolder:images",
        val_fraction=0.25,
        out="runs/python",
        **FIELDS,
    )
    assert load_adapter(train(resume=run)).digest == load_adapter(run).digest
    assert capfd.readouterr() == ("", "")

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FIELDS.items()]
    command = ["--recipe=small", "--data=imagefolder:images", "--val-fraction=0.25"]
    model = [f"--architecture={tiny_clip_dir}", "--pretrained=none"]
    assert train_command([*command, *model, *flags, "--out=runs/command"]) == 0
    mine = load_adapter(run)
    other = load_adapter("runs/command")
    assert mine.digest == other.digest and mine.metadata == other.metadata
    assert run.metrics == mine.metadata.metrics
    assert set(run.metrics) == {"acc1@alpha=0.5", "acc1@alpha=1"}
    assert run.recipe.to_dict() == mine.metadata.recipe
    assert os.fspath(run) == str(run.folder) == "runs/python"
    assert run.adapter.is_file() and run.notes == ()
    assert repr(run).startswith("Run('runs/python', {acc1@alpha=0.5: ")

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    Path("file").touch()
    with pytest.raises(RAdapterError, match="^file/run: Not a directory$"):
        train(dataclasses.replace(run.recipe, out=Path("file/run")))
    # A batch of all images, and an average that keeps little.
    few = dataclasses.replace(run.recipe, out=Path("few"), batch_size=100, momentum=0.99, steps=3)
    capfd.readouterr()
    notes = train(few).notes
    printed = capfd.readouterr().out
    places = [printed.index(words) for words in (*notes, "wrote few")]
    assert len(notes) == 2 and places == sorted(places)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (train, {}, "no training data; name it with --data"),
        (train, {"resume": "nowhere"}, "no run to resume in nowhere"),
        (train, {"recipe": 5}, "the recipe is 5; allowed: "),
        (train, {"data": Path("photos")}, "data is PosixPath('photos'); it should be"),
        (evaluate, {"suite": "pacs", "data": "imagefolder:x"}, "are both given; leave one out"),
        (evaluate, {"suite": "pacs"}, "no run with an adapter in "),
        (evaluate, {"suite": "pacs", "release": "r"}, "no argument 'release'; allowed are"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    call: Callable[..., object],
    arguments: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RAdapterError) as error:
        call(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "") and not any(tmp_path.iterdir())


def test_an_image_takes_the_way_that_the_page_describes(
    tiny_clip_dir: str, images: Path, tmp_path: Path
) -> None:
    recipe = short_run(tiny_clip_dir, tmp_path, data=str(images), steps=1, warmup_steps=0)
    recipe = dataclasses.replace(recipe, preserve=1.0)
    check_walk("Follow one image", lambda: train(recipe))
