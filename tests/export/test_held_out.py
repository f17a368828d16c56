"""What `--val-fraction` holds out: never trained on, known again by eval and export, refused once
it has changed.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from radapter_export import ExportSettings, export_release
from radapter_export.accuracy import open_validation
from radapter_serve.adapter import Metadata, load_adapter
from radapter_serve.cli.eval import main as evaluate
from radapter_serve.cli.train import main as train
from radapter_serve.data.captions import load_captioned
from radapter_serve.data.labelled import Labelled, load_labelled
from radapter_serve.data.rows import LabelledImages
from radapter_serve.data.runs import held_out_digest
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.models import TorchEncoder
from radapter_serve.evaluation.sets import open_set, own_validation
from tests.helpers.own_cache import own_cache as own_cache

COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 40), "red": (220, 30, 30)}
DATA = {"classification": "imagefolder:photos", "segmentation": "masks:masked"}
RUN = (
    "--steps 4 --batch-size 3 --warmup-steps 1 --momentum 0.5 --workers 0 --tracker none"
    " --mask-min-area 1"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: `photos` of three classes, and in `masked` the same 12 images with
    masks.
    """
    for folder in ("masked/images", "masked/masks", *(f"photos/{name}" for name in COLOURS)):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "masked" / "classes.txt").write_text("\n".join(COLOURS))
    for number in range(12):
        label = number % 3
        name = sorted(COLOURS)[label]
        image = Image.new("RGB", (40, 36), COLOURS[name])
        image.putpixel((number, 0), (255, 255, 255))  # no two are equal
        for path in (f"photos/{name}/{number}.png", f"masked/images/{number}.png"):
            image.save(tmp_path / path)
        Image.fromarray(np.full((36, 40), label, np.uint8)).save(
            tmp_path / "masked" / "masks" / f"{number}.png"
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(metadata: Metadata) -> list[str]:
    """The files that the run's own validation data consists of."""
    suite = own_validation(metadata)
    data: Any = open_set(suite, suite.entries[0])
    return [str(Path(image.name).name) for image in data.images]


@pytest.mark.slow
@pytest.mark.parametrize("task", DATA)
def test_a_held_out_share_is_evaluated_and_a_changed_one_refused(
    task: str,
    tiny_clip_dir: str,
    here: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    trained = set()
    pair = LabelledImages.pair
    embed = LoadedRelease.embed_texts

    def recorded(self: Any, row: Any, draw: random.Random) -> Any:
        trained.add(
            Path(self.name(row) if isinstance(self, Labelled) else self.images[row[0]].path).name
        )
        return pair(self, row, draw)

    monkeypatch.setattr(LabelledImages, "pair", recorded)
    command = [
        "--architecture",
        tiny_clip_dir,
        "--data",
        DATA[task],
        "--task",
        task,
        "--val-fraction",
        "0.25",
    ]
    run = RUN if task == "segmentation" else RUN.partition(" --mask-min-area")[0]
    assert train([*command, *run.split(), "--out", "run"]) == 0
    metadata = load_adapter("run").metadata
    held = evaluated(metadata)
    assert len(held) == 3 and len(trained) == 9 and not trained & set(held)
    names = [
        f"{sorted(COLOURS)[int(Path(name).stem) % 3]}/{name}" if task == "classification" else name
        for name in held
    ]
    lines = "".join(f"{name}\n" for name in sorted(names))
    assert metadata.held_out == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"

    assert evaluate(["--adapter", "run", "--alpha", "auto", "--out", "results"]) == 0
    choice = json.loads(Path("run/alpha.json").read_text())
    assert choice["sets"]["validation"]["n"] == 3
    asked: list[str] = []
    said: list[str] = []

    def embed_and_record(self: LoadedRelease, texts: Any) -> Any:
        if not isinstance(self.encoder, TorchEncoder):
            asked.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(LoadedRelease, "embed_texts", embed_and_record)
    settings = ExportSettings(precision="fp16", max_drop=100)
    (release,) = export_release("run", None, settings, progress=said.append)
    assert [line for line in said if "label set" in line] == [
        "embedding label set classes: 0 of 3 labels", "embedding label set classes: 3 of 3 labels"
    ]  # fmt: skip
    assert not {"a photo of a red.", "red"} & set(asked)  # the label set has them
    assert release.accuracy is not None and release.accuracy.n == 3
    assert release.accuracy.metric == choice["sets"]["validation"]["metric"]

    folder = DATA[task].partition(":")[2]
    shutil.copytree(here / folder, here / "elsewhere" / folder)
    monkeypatch.chdir(here / "elsewhere")
    assert evaluated(metadata) == held
    monkeypatch.chdir(here)
    for path in here.joinpath(folder).rglob("11.png"):
        shutil.copy(path, path.with_name("99.png"))
    capfd.readouterr()
    assert evaluate(["--adapter", "run", "--alpha", "auto", "--out", "other"]) == 2
    error = capfd.readouterr().err
    assert f"error: {DATA[task]} has changed since training" in error and error.count("\n") == 1
    with pytest.raises(
        RAdapterError, match="has changed since training.*--validation DATA or none"
    ):
        export_release("run", None, ExportSettings(precision="fp16"))
    assert open_validation(metadata, "none", None, "fp16", 0.5) is None
    assert open_validation(metadata, None, None, "fp32", 0.5) is None
    with pytest.raises(RAdapterError, match="is what the run was trained with"):
        open_validation(metadata, DATA[task], None, "fp16", 0.5)


def test_a_run_does_not_go_on_with_another_share(
    tiny_clip_dir: str, here: Path, capfd: Any
) -> None:
    command = [
        "--architecture",
        tiny_clip_dir,
        "--data",
        "imagefolder:photos",
        "--val-fraction",
        "0.25",
    ]
    run = RUN.partition(" --mask-min-area")[0].split()
    assert train([*command, *run, "--save-every", "2", "--out", "run"]) == 0
    shutil.copy(here / "photos" / "blue" / "0.png", here / "photos" / "blue" / "00.png")
    assert train(["--resume", "run"]) == 2
    assert (
        "imagefolder:photos has changed since run/checkpoint.pt was written"
        in capfd.readouterr().err
    )


def test_images_in_a_table_are_known_by_their_bytes_and_captions_by_their_image(here: Path) -> None:
    files = sorted(here.glob("photos/*/*.png"))[:3]
    texts = pd.DataFrame(
        {"image": [str(file) for file in files for _ in "ab"], "caption": list("abcdef")}
    )
    texts.to_csv("texts.csv", index=False)
    lines = "".join(
        sorted(f"{file.name}\n" for file in files)
    )  # all of one class, and so in one folder
    assert (
        held_out_digest(load_captioned("csv:texts.csv"))
        == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    )
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": "x"} for file in files],
        "label": list("aab"),
    }
    pd.DataFrame(rows).to_parquet("t.parquet")
    lines = "".join(sorted(f"{hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files))
    digest = held_out_digest(load_labelled("parquet:t.parquet"))
    assert digest == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
