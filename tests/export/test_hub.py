"""Releases on the hub: what is sent, what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants, snapshot_download

from radapter_export import ExportSettings, export_release
from radapter_export.hub import BUILT, RELEASE, Hub, files_of, take
from radapter_export.merged import CONFIG, WEIGHTS
from radapter_serve import Model, RAdapterError
from radapter_serve.cli.export import main as export
from radapter_serve.cli.serve import main as serve
from radapter_serve.hub import unreachable
from radapter_serve.release.config import check, read_config
from radapter_serve.release.release import Release
from radapter_serve.release.repository import CONFIG as MODEL_CONFIG
from radapter_serve.release.repository import MODELS
from tests.helpers.fake_hub import FakeHub, fake_hub
from tests.helpers.small_release import png

NAME = "someone/tiny-clip"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def send(folder: Path, version: int, merged: Path, card: str | None = "a card") -> str:
    """Push a release that is exported already."""
    release = Release.load(folder / "model_repository" / "classify" / str(version))
    files = files_of(folder / "model_repository", release, merged, None, card)
    return Hub.open(NAME).push(files, release, "here")


@pytest.fixture
def pushed(hub: FakeHub, dense_tiny_clip: Path) -> str:
    """A release with patches and a label set, on the hub; the name with the commit."""
    return send(dense_tiny_clip, 1, dense_tiny_clip / "merged")


def test_a_release_travels(
    pushed: str, hub: FakeHub, dense_tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub.files(NAME)
    here = dense_tiny_clip / "model_repository"
    merged = {path.name: path.read_bytes() for path in (dense_tiny_clip / "merged").iterdir()}
    del merged["README.md"]  # which is for a folder
    assert {name: data for name, data in files.items() if "/" not in name} == {
        **merged,
        "README.md": b"a card",
        ".gitattributes": b"",
    }
    assert {name for name in files if name.startswith("release/")} == {
        *(f"release/{one}" for one in ("release.json", "tokenizer.json", "SHA256SUMS")),
        "release/label_sets/four.npz",
        *(f"release/{one}_encoder/model.onnx" for one in ("image", "text", "patch")),
        *(f"release/{one}_encoder/samples.npz" for one in ("image", "text", "patch")),
    }
    assert hub.private == {NAME}
    assert pushed == f"hf-hub:{NAME}@{hub.repositories[NAME][-1][0]}"

    own = Model(here)
    texts = ["a cat", "a dog"]
    with own, Model(f"hf-hub:{NAME}") as model, Model(pushed) as at_commit:
        np.testing.assert_array_equal(model.embed_images([png(1)]), own.embed_images([png(1)]))
        np.testing.assert_array_equal(at_commit.embed_texts(texts), own.embed_texts(texts))
        expected = own.classify(png(1), label_set="four")
        assert model.classify(png(1), label_set="four") == expected
        assert (model.segment(png(1), texts).mask == own.segment(png(1), texts).mask).all()
        assert model.release() == own.release()
    # What comes back is what the export wrote, configs and code included.
    there = take(pushed)
    assert there is not None
    check(there, [1])
    for model_name in MODELS:
        ours = read_config(here / model_name / MODEL_CONFIG)
        assert read_config(there / model_name / MODEL_CONFIG) == ours
        names = {path.name for path in (here / model_name / "1").iterdir()}
        assert {path.name for path in (there / model_name / "1").iterdir()} == names

    # Without the hub the cache is enough; what was never fetched is said in one line.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    unreachable.cache_clear()
    before = len(hub.asked)
    with Model(f"hf-hub:{NAME}") as model:
        assert model.release().alpha == 0.5
    assert len(hub.asked) == before
    with pytest.raises(RAdapterError, match=r"hf-hub:a/b is not on this machine") as absent:
        Model("hf-hub:a/b")
    assert 'run `hf download a/b --include "release/*"`, and copy models--a--b' in str(absent.value)


def test_a_model_repository_on_the_hub_is_never_served(pushed: str, hub: FakeHub) -> None:
    theirs = take(pushed)
    assert theirs is not None
    found = [path for path in theirs.rglob("*") if path.is_file()]
    hostile = {
        f"{at}/{path.relative_to(theirs)}": path.read_bytes()
        for path in found
        for at in ("model_repository", "radapter")
    }
    code = b"raise SystemExit('code of the hub')\n"
    hostile |= {name: code for name in hostile if name.endswith(".py")}
    assert code in hostile.values()
    oid = hub.commit(NAME, {**hub.files(NAME), **hostile})
    folder = Path(snapshot_download(NAME))  # all of it, as `hf download` brings it
    assert folder.name == oid and (folder / "model_repository" / "classify").is_dir()
    for _ in range(2):  # built, and found again
        there = take(f"hf-hub:{NAME}")
        assert there is not None and not there.is_relative_to(folder)
        assert there != theirs
        check(there, [1])
        assert code not in [path.read_bytes() for path in there.rglob("*.py")]


def test_the_next_push_takes_the_place_of_the_last(
    pushed: str, hub: FakeHub, exported_tiny_clip: Path
) -> None:
    newer = send(exported_tiny_clip, 2, exported_tiny_clip / "merged" / "alpha-0.8", None)
    files = hub.files(NAME)
    assert not [name for name in files if "patch" in name] and len(files) > 5
    assert files["README.md"] == b"a card"  # which a push without one leaves alone
    with Model(f"hf-hub:{NAME}") as new, Model(pushed) as old:
        assert (new.release().alpha, old.release().alpha) == (0.8, 0.5)
        assert new.release().version == 2
    assert newer != pushed


def test_open_clip_and_radapter_take_the_weights_of_a_push(
    pushed: str, hub: FakeHub, dense_tiny_clip: Path
) -> None:
    from radapter_serve.clip.base import load_base

    base = load_base(pushed)
    image = [png(1)]
    with Model(dense_tiny_clip / "merged") as merged, Model(pushed, dense="naclip") as model:
        np.testing.assert_array_equal(model.embed_images(image), merged.embed_images(image))
    assert base.name == pushed
    asked = [path for _, path in hub.asked if "/resolve/" in path]
    assert not [path for path in asked if "/release/" in path]  # torch needs none of it
    assert any(path.endswith(WEIGHTS) for path in asked)
    assert any(path.endswith(CONFIG) for path in asked)


@pytest.mark.slow
def test_transformers_opens_it_from_the_hub(
    hub: FakeHub, adapter_path: Path, tmp_path: Path, quick: None
) -> None:
    from transformers import AutoModel, AutoTokenizer

    settings = ExportSettings(
        model_repository=tmp_path / "repository",
        merged=tmp_path / "merged",
        transformers=tmp_path / "form",
        push="tiny-clip",  # of the own account
    )
    [done] = export_release(adapter_path, [0.3], settings)
    assert done.pushed is not None and done.pushed.startswith(f"hf-hub:{NAME}@")
    files = hub.files(NAME)
    form = {path.name: path.read_bytes() for path in (tmp_path / "form").iterdir()}
    sent = {f"transformers/{name}": data for name, data in form.items()}
    del sent["transformers/README.md"], sent["transformers/release.json"]
    assert {name: data for name, data in files.items() if name.startswith("trans")} == sent
    card = files["README.md"].decode()
    assert f'"hf-hub:{NAME}"' in card and "FOLDER" not in card
    assert 'subfolder="transformers"' in card
    assert ModelCard(card).data.get("library_name") == "open_clip"
    root = tmp_path / "as-on-the-hub"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    assert AutoModel.from_pretrained(root, subfolder="transformers").config.model_type == "clip"
    tokenizer = AutoTokenizer.from_pretrained(root, subfolder="transformers")
    assert tokenizer("a cat").input_ids[0] == 49406


SERVER = "the hub answers 503; try again later"
UNKNOWN = "the hub does not know who asks, or has no such repository (401); look at the name"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({("POST", "create"): 401}, UNKNOWN),
        ({("POST", "create"): 503}, SERVER),
        ({("POST", "/commit/"): 403}, "nothing of it was sent, and the export is complete in"),
    ],
)
def test_a_hub_that_refuses_a_push(
    answers: dict[tuple[str, str], int],
    message: str,
    hub: FakeHub,
    adapter_path: Path,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.answers = answers
    monkeypatch.chdir(tmp_path)
    assert export(["--adapter", str(adapter_path), "--alpha", "0.3", "--push", NAME]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"radapter-export: error: could not push to {NAME}: ")
    assert message in line
    late = ("POST", "/commit/") in answers
    assert (tmp_path / "merged").exists() == late
    assert (tmp_path / "model_repository").exists() == late
    if late:
        assert list(hub.files(NAME)) == [".gitattributes"]
        hub.answers = {}
        assert export(["--adapter", str(adapter_path), "--alpha", "0.3", "--push", NAME]) == 0
        oid = hub.repositories[NAME][-1][0]
        assert f"Pushed: hf-hub:{NAME}@{oid}\n" in capsys.readouterr().out
        assert f'"hf-hub:{NAME}"' in hub.files(NAME)["README.md"].decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "a/b/c"], "that is no name of a repository; write ORGANISATION/NAME"),
        (["--push", NAME, "--alpha", "0.3", "0.8"], "sends one release, and --alpha names 2"),
        (["--push", NAME, "--format", "tensorrt"], "engine of TensorRT is for one kind of GPU"),
        (["--push", f"{NAME}@v1"], "leave out @v1"),
    ],
)
def test_what_can_not_be_pushed(
    arguments: list[str],
    message: str,
    hub: FakeHub,
    adapter_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(["--adapter", str(adapter_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not hub.repositories and not (tmp_path / "merged").exists()


def test_without_a_token_nothing_is_asked(
    hub: FakeHub, adapter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    settings = ExportSettings(merged=tmp_path / "merged", push=NAME)
    with pytest.raises(RAdapterError, match="needs a token .* run: hf auth login"):
        export_release(adapter_path, [0.3], settings)
    assert not hub.asked and not (tmp_path / "merged").exists()


def test_no_hub_at_all(
    hub: FakeHub, adapter_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    unreachable.cache_clear()
    settings = ExportSettings(merged=tmp_path / "merged", push=NAME)
    with pytest.raises(RAdapterError, match="can't be reached .*nothing was exported"):
        export_release(adapter_path, [0.3], settings)
    with pytest.raises(RAdapterError, match="is not on this machine, and the Hugging Face hub"):
        take(f"hf-hub:{NAME}")


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("hf-hub:no/thing", {}, "(404)"),
        ("hf-hub:a/b/c", {}, "that is no name of a repository"),
        (f"hf-hub:{NAME}", {("GET", "^/api/models"): 503}, SERVER),
        (f"hf-hub:{NAME}", {}, "holds no release; export one from it with radapter-export"),
    ],
)
def test_what_can_not_be_served(
    name: str,
    answers: dict[tuple[str, str], int],
    message: str,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.commit(NAME, {"config.json": b"{}"})
    hub.answers = answers
    assert serve([name, "--engine", "process"]) == 2
    said = capsys.readouterr().err
    assert "No files matched" not in said
    error = said.strip().splitlines()[-1]
    assert error.startswith("radapter-serve: error: ") and message in error


BROKEN = {
    "release/image_encoder/model.onnx": (b"no graph", "image_encoder/model.onnx differs"),
    "release/text_encoder/model.onnx": (None, "text_encoder/model.onnx is missing"),
    "release/tokenizer.json": (b"", "tokenizer.json differs"),
    "release/SHA256SUMS": (None, "SHA256SUMS, the list of its digests, is missing"),
    "release/classify/model.py": (b"raise SystemExit", "classify/model.py is no part of a release"),
    "release/image_encoder/config.pbtxt": (b"backend: 'x'", "config.pbtxt is no part of a release"),
}


def test_what_differs_is_refused_by_name(pushed: str, hub: FakeHub, tmp_path: Path) -> None:
    good = hub.files(NAME)
    for file, (data, message) in BROKEN.items():
        files = {name: content for name, content in good.items() if name != file}
        if data is not None:
            files[file] = data
        oid = hub.commit(NAME, files)
        with pytest.raises(RAdapterError, match=f"is not as it was pushed: .*{re.escape(message)}"):
            Model(f"hf-hub:{NAME}@{oid}")
    assert not list((tmp_path / "cache").rglob(BUILT))


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("version", "../../x", "says version '../../x'"),
        ("runtime", "python", "says runtime 'python'"),
        ("max_batch_size", -1, "says max_batch_size -1"),
        ("label_sets", {"x": 5}, "says label_sets {'x': 5}, which no release has"),
        ("tokenizer", {}, "is broken"),
    ],
)
def test_facts_that_no_export_writes(
    fact: str, value: object, message: str, exported_tiny_clip: Path, hub: FakeHub, tmp_path: Path
) -> None:
    repository = exported_tiny_clip / "model_repository"
    release = Release.load(repository / "classify" / "2")
    wrong = tmp_path / "wrong"
    shutil.copytree(repository, wrong)
    facts = json.loads((wrong / "classify" / "2" / "release.json").read_text())
    (wrong / "classify" / "2" / "release.json").write_text(json.dumps({**facts, fact: value}))
    empty = tmp_path / "empty"
    empty.mkdir()
    files = files_of(wrong, release, empty, None, None)
    read = {
        name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()
    }
    assert all(name.startswith(RELEASE) for name in read)
    hub.commit(NAME, read)
    with pytest.raises(RAdapterError, match=re.escape(message)):
        Model(f"hf-hub:{NAME}")


def test_a_cache_that_can_not_be_written(
    pushed: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(RAdapterError, match="No space left|no space left"):
            take(pushed)
    assert take(pushed) is not None
