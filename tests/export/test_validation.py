"""Validation data of an export: what a run held out, and calibrated scores."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from radapter_export import ExportSettings, export_release
from radapter_export.checks import open_validation
from radapter_export.release import UNFITTED
from radapter_serve.adapter import Metadata, load_adapter, save_adapter
from radapter_serve.cli.eval import main as evaluate
from radapter_serve.cli.train import main as train_command
from radapter_serve.clip.towers import TorchEncoder
from radapter_serve.data.captions import load_captioned
from radapter_serve.data.labelled import load_labelled
from radapter_serve.data.runs import held_out_digest
from radapter_serve.data.source import DataSource
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.rows import what_is_kept
from radapter_serve.evaluation.run import open_set, own_validation
from tests.export.conftest import Export
from tests.helpers.small_models import make_base, random_adapter
from tests.training.conftest import COLOURS


@pytest.mark.slow
def test_scores_of_a_siglip_are_fitted(export: Export, many_photos: Path, tmp_path: Path) -> None:
    base = make_base("siglip", tmp_path / "base")
    save_adapter(random_adapter(base), tmp_path / "adapter.safetensors")
    data = f"imagefolder:{many_photos}"
    (exported,) = export([1.0], adapter=tmp_path, validation=data, max_drop=100)
    assert UNFITTED not in exported.warnings
    confidence = exported.release.confidence
    assert confidence is not None and confidence.temperature is None  # its sigmoid is fitted


DATA = {"classification": "imagefolder:photos", "segmentation": "masks:masked"}
RUN = (
    "--val-fraction 0.25 --steps 4 --batch-size 3 --warmup-steps 1 --momentum 0.5 --workers 0"
    " --tracker none --out run"
)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: 12 `photos` of three classes, and in `masked` the same with masks."""
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
        mask = Image.fromarray(np.full((36, 40), label, np.uint8))
        mask.save(tmp_path / "masked" / "masks" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(names: list[str]) -> str:
    lines = "".join(f"{name}\n" for name in sorted(names))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def evaluated(metadata: Metadata) -> list[str]:
    """The files that the run's own validation data consists of."""
    suite = own_validation(metadata)
    data: Any = open_set(suite, suite.entries[0])
    return [Path(image.name).name for image in data.images]


@pytest.mark.slow
@pytest.mark.parametrize("task", DATA)
def test_a_held_out_share_is_evaluated_and_a_changed_one_refused(
    task: str,
    tiny_clip_dir: str,
    workdir: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    embedded: list[str] = []
    embed_texts = LoadedRelease.embed_texts

    def record(self: LoadedRelease, texts: Any) -> Any:
        if not isinstance(self.encoder, TorchEncoder):
            embedded.extend(texts)
        return embed_texts(self, texts)

    monkeypatch.setattr(LoadedRelease, "embed_texts", record)
    command = f"--architecture {tiny_clip_dir} --data {DATA[task]} --task {task} {RUN}"
    if task == "segmentation":
        command += " --mask-min-area 1"
    assert train_command(command.split()) == 0
    metadata = load_adapter("run").metadata
    image_names = evaluated(metadata)
    names = image_names
    if task == "classification":
        names = [f"{sorted(COLOURS)[int(Path(name).stem) % 3]}/{name}" for name in image_names]
    assert metadata.held_out == digest(names)

    assert evaluate(["--adapter", "run", "--alpha", "auto", "--out", "results"]) == 0
    chosen = json.loads(Path("run/alpha.json").read_text())
    choice = chosen["sets"]["validation"]
    assert choice["n"] == 3
    assert len(image_names) == 3
    settings = ExportSettings(precision="fp16", max_drop=100)
    (release,) = export_release("run", None, settings)
    assert not {"a photo of a red.", "red"} & set(embedded)  # the label set has them
    assert release.accuracy is not None
    assert (release.accuracy.n, release.accuracy.metric) == (3, choice["metric"])
    [kept] = [each["kept"] for each in chosen["curve"] if each["alpha"] == release.release.alpha]
    said = [line for line in release.warnings if " of what the base answers" in line]
    assert said == ([] if kept is None else [what_is_kept(release.release.alpha, kept)])

    # The same images in another place are the same; with one more they are others.
    folder = DATA[task].partition(":")[2]
    shutil.copytree(workdir / folder, workdir / "elsewhere" / folder)
    monkeypatch.chdir(workdir / "elsewhere")
    assert evaluated(metadata) == image_names
    monkeypatch.chdir(workdir)
    for path in workdir.joinpath(folder).rglob("11.png"):
        shutil.copy(path, path.with_name("99.png"))
    capfd.readouterr()
    assert evaluate(["--adapter", "run", "--alpha", "auto", "--out", "other"]) == 2
    assert f"error: {DATA[task]} has changed since training" in capfd.readouterr().err
    with pytest.raises(RAdapterError, match="has changed since training.*--validation DATA or no"):
        export_release("run", None, ExportSettings(precision="fp16"))
    assert open_validation(metadata, "none", None, "fp16") is None
    assert open_validation(metadata, None, None, "fp32") is None  # unless it is asked for
    shutil.rmtree(workdir / folder)
    shutil.copytree(workdir / "elsewhere" / folder, workdir / folder)
    asked_for = open_validation(metadata, "own", None, "fp32")
    assert asked_for is not None and len(asked_for) == 3
    with pytest.raises(RAdapterError, match="is what the run was trained with"):
        open_validation(metadata, DATA[task], None, "fp16")


def test_a_run_is_not_resumed_with_another_share(
    tiny_clip_dir: str, workdir: Path, capfd: Any
) -> None:
    command = f"--architecture {tiny_clip_dir} --data imagefolder:photos --save-every 2 {RUN}"
    assert train_command(command.split()) == 0
    shutil.copy(workdir / "photos" / "blue" / "0.png", workdir / "photos" / "blue" / "00.png")
    assert train_command(["--resume", "run"]) == 2
    error = capfd.readouterr().err
    assert "imagefolder:photos has changed since run/checkpoint.pt was written" in error


def test_images_in_a_table_are_known_by_their_bytes_and_captions_by_their_image(
    workdir: Path,
) -> None:
    files = sorted(workdir.glob("photos/*/*.png"))[:3]  # all of one class, and so in one folder
    rows = [(str(file), f"{file.name} {word}") for file in files for word in ("one", "two")]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv("texts.csv", index=False)
    expected = digest([file.name for file in files])
    assert held_out_digest(load_captioned(DataSource("csv:texts.csv"))) == expected
    images = [{"bytes": file.read_bytes(), "path": "x"} for file in files]
    pd.DataFrame({"image": images, "label": list("aab")}).to_parquet("t.parquet")
    expected = digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert held_out_digest(load_labelled(DataSource("parquet:t.parquet"))) == expected
