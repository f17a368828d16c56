"""radapter-index as a user runs it, with a tiny release."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from radapter_serve import Model
from radapter_serve.cli import query
from radapter_serve.cli import release as release_command
from radapter_serve.cli.index import main
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.index.index import current
from radapter_serve.release.release import Dense, LabelSetFacts, Release
from radapter_serve.release.repository import releases_with_images
from tests.helpers.indexes import generation
from tests.helpers.small_release import CONFIDENCE, needs_bf16, photos_in


@pytest.fixture
def place(exported_tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with photos and a model repository."""
    photos_in(tmp_path / "photos", 5)
    (tmp_path / "model_repository").symlink_to(exported_tiny_clip / "model_repository")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_build_add_info_verify(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "photos", "--out", "indexes/photos"]) == 0
    said = capsys.readouterr().out
    assert "5 images (5 embedded)" in said and "radapter-query search" in said
    assert main(["verify", "indexes/photos"]) == 0
    assert "agree" in capsys.readouterr().out
    assert main(["info", "indexes/photos"]) == 0
    said = capsys.readouterr().out
    assert "alpha 0.8" in said and "path, width, height, digest" in said and "exact" in said

    # The commands that are printed put it in order.
    shutil.copy("photos/0.png", "photos/copy.png")
    shutil.copy("photos/2.png", "photos/4.png")
    Path("photos/1.png").unlink()
    assert main(["verify", "indexes/photos"]) == 1
    said = capsys.readouterr().out
    assert "file gone: 1" in said and "not in the index: 1" in said
    commands = printed(said)
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)) == 0
    assert main(["verify", "indexes/photos"]) == 0


def test_errors_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "photos" / "bad.png").write_bytes(b"no image")
    Path("empty").mkdir()
    build = ["build", "photos", "--out", "i"]
    for arguments, match in (
        (build, "--on-broken skip"),
        (["build", "csv:nowhere.csv", "--out", "i"], "nowhere.csv"),
        ([*build, "--thumbnails", "-1"], "0 (none) to 1024"),
        ([*build, "--model-repository", "model_repository@9"], "it holds 1, 2"),
        ([*build, "--url", "grpc://127.0.0.1:9"], "127.0.0.1:9"),
        ([*build, "--url", "grpc://127.0.0.1:9", "--precision", "bf16"], "embeds in its own"),
        (["add", "--out", "i"], "radapter-index build"),
        (["info", "i"], "no index at i"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert match in error and "Traceback" not in error, (arguments, error)
        assert not Path("i").exists() and not list(place.glob(".i*"))

    # An addition does with broken images as the build did.
    assert main([*build, "--on-broken", "skip"]) == 0
    assert "1 images can't be read, see i/broken.txt" in capsys.readouterr().out
    assert main(["add", "--out", "i"]) == 0
    assert "1 images can't be read" in capsys.readouterr().out
    assert main(["add", "--out", "i", "--on-broken", "refuse"]) == 2
    assert "'bad.png' can't be indexed" in capsys.readouterr().err


def test_build_at_an_alpha_without_torch(
    place: Path,
    dynamic_tiny_clip: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("torch", "open_clip"):  # of what a module imports, see tests/test_house.py
        monkeypatch.setitem(sys.modules, name, None)
    dynamic = ["--model-repository", str(dynamic_tiny_clip)]
    assert main(["build", "photos", "--out", "indexes/photos", *dynamic, "--alpha", "0.8"]) == 0
    assert main(["add", "--out", "indexes/photos", *dynamic]) == 0
    assert main(["verify", "indexes/photos"]) == 0
    assert "the index, at alpha 0.8, and the files agree" in capsys.readouterr().out
    command = current(Path("indexes/photos"))[1].plan.command(Path("indexes/photos"))
    assert command.endswith(f"--model-repository {dynamic_tiny_clip} --alpha 0.8")
    # It is the index that the release with this alpha folded in makes.
    assert main(["add", "--out", "indexes/photos"]) == 0
    capsys.readouterr()
    assert main(["build", "photos", "--out", "indexes/other", "--alpha", "0.5"]) == 2
    assert "exported at alpha 0.8; radapter-export --alpha dynamic" in capsys.readouterr().err
    assert not Path("indexes/other").exists()


@needs_bf16
def test_an_index_in_bf16_stays_in_bf16(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("indexes/photos")
    assert main(["build", "photos", "--out", str(out), "--precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "precision bf16 with openvino" in said and "at alpha 0.8, bf16" in said
    made_by = current(out)[1].plan.release
    assert made_by.precision == "bf16" and 0 < (made_by.image_distance or 0) < 2e-4

    # What is added later has the same precision, by whichever command.
    of_images = Path("model_repository"), made_by.image_digest, made_by.alpha
    assert releases_with_images(*of_images, "bf16") == [made_by.version]
    assert not releases_with_images(*of_images, None)
    photos_in(Path("photos/more"), 1)
    assert main(["add", "--out", str(out)]) == 0
    photos_in(Path("photos/most"), 1)
    assert main(["add", "--out", str(out), "--model-repository", "model_repository"]) == 0
    capsys.readouterr()
    command = shlex.split(current(out)[1].plan.command(out))
    assert command[-2:] == ["--precision", "bf16"]
    assert main(command[1:]) == 0
    assert "up to date, 7 images" in capsys.readouterr().out
    with Model("model_repository", precision="bf16") as rounded, Model("model_repository") as exact:
        name = "most/0.png"
        image = Path("photos", name).read_bytes()
        query: dict[str, Any] = {"image": image, "index": "photos", "where": f"path = '{name}'"}
        assert abs(1 - rounded.search(**query)[0].score) < 1e-6
        assert 1e-6 < 1 - exact.search(**query)[0].score < 2e-4


def test_map_then_the_printed_build(
    exported_tiny_clip: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos_in(place / "many", 120, 8, 8)
    first, second = (["--model-repository", f"model_repository@{number}"] for number in (1, 2))
    assert main(["build", "many", "--out", "indexes/many", *first]) == 0
    search = ["search", "a red bicycle", "--index", "many", "--release", "2"]
    search += ["--model", "model_repository"]
    capsys.readouterr()
    assert query.main(search) == 2
    assert "radapter-index map" in capsys.readouterr().err
    command = ["map", "indexes/many", *second, "--min-recall"]
    assert main([*command, "1"]) == 2
    assert "--min-recall is 1; build the index again" in capsys.readouterr().err
    assert main([*command, "0.5"]) == 0
    said = capsys.readouterr().out
    assert "mapped from " in said and "release 1: recall@10 " in said
    assert main(["info", "indexes/many"]) == 0
    assert "among 120 images that were held out" in capsys.readouterr().out
    assert query.main(search) == 0
    assert "note: the index many is mapped from another image tower" in capsys.readouterr().err

    # The build that it prints embeds all images, and so does --embed.
    [build] = re.findall("radapter-index (build.*)", said)
    assert main(shlex.split(build)) == 0
    assert "120 images (120 embedded)" in capsys.readouterr().out
    assert current(Path("indexes/many"))[1].mapped is None
    back = ["map", "indexes/many", *first, "--min-recall", "0.5", "--embed"]
    assert main(back) == 0
    assert "120 images (120 embedded)" in capsys.readouterr().out


def printed(said: str) -> list[str]:
    """The arguments of the commands that a message shows, each up to the end of its clause."""
    return re.findall(
        r"radapter-index (.*?)(?=;| removes them| embeds| adds them|$)", said, re.MULTILINE
    )


def test_the_served_release_embeds_and_every_advice_ends_the_trouble(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("model_repository", "my models")
    Path("model_repository").unlink()
    assert release_command.main(["load", "1", "--model-repository", "my models"]) == 0
    out = "my indexes/Büro"
    assert main(["build", "photos", "--out", out, "--model-repository", "my models"]) == 0
    assert f"release 1 of {place / 'my models'} embeds: " in capsys.readouterr().out

    # The index remembers its repository and its release, from any folder.
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    out = f"../{out}"
    second = ["--model-repository", str(place / "my models@2")]
    assert release_command.main(["load", "2", "--model-repository", str(place / "my models")]) == 0
    assert main(["add", "--out", out]) == 0
    assert "up to date, 5 images" in capsys.readouterr().out

    # Another release is refused, and the command that the message shows works.
    assert main(["add", "--out", out, *second]) == 2
    [build] = printed(capsys.readouterr().err)
    assert main(shlex.split(build)) == 0
    said = capsys.readouterr().out
    assert "5 images (5 embedded)" in said and "--index 'Büro' --release 2" in said
    assert main(["add", "--out", out, *second]) == 0

    # So does the advice on damage.
    data = generation(Path(out)) / "rows.arrow"
    data.write_bytes(data.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["verify", out]) == 2
    (advice,) = printed(capsys.readouterr().err)
    assert main(shlex.split(advice)) == 0 and main(["verify", out]) == 0


def test_a_load_says_what_the_release_lacks(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Path("my models")
    shutil.copytree("model_repository", models)
    before = Release.load(models / "classify" / "2")
    sets = {**before.label_sets, "nine": LabelSetFacts(9, [], "sha256:9")}
    dense = Dense("naclip", 2)
    after = dataclasses.replace(before, label_sets=sets, dense=dense, confidence=CONFIDENCE)
    after.save(models / "classify" / "2")
    none = Path("none")
    [lacking] = release_command.lacking(models, [1, 2], [1], none)
    assert "release 1 lacks what release 2 has: dense features" in lacking
    assert "calibrated scores" in lacking and "the label sets nine" in lacking
    assert release_command.lacking(models, [1], [1, 2], none) == []
    assert release_command.lacking(models, [9], [1], none) == []
    assert release_command.main(["load", "1", "--model-repository", str(models)]) == 0
    said = capsys.readouterr().out
    assert "release 1 is served" in said and lacking in said


def test_a_stopped_build_is_put_in_order_by_sigterm(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LoadedRelease, "embed_pixels", stop)
    assert main(["build", "photos", "--out", "i"]) == 143
    assert "interrupted" in capsys.readouterr().err
    assert not list(place.glob(".i*"))
