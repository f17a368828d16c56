"""Releases on the hub, by a stand-in for its HTTP that keeps every commit."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants, snapshot_download

from radapter_export import ExportSettings
from radapter_export.card import card_of
from radapter_export.hub import BUILT, download_release, prepare_push, push
from radapter_serve import Model, RAdapterError
from radapter_serve.adapter import Metadata
from radapter_serve.cli.export import main as export_command
from radapter_serve.cli.serve import main as serve
from radapter_serve.evaluation.alpha_choice import CurvePoint
from radapter_serve.evaluation.rows import what_is_kept
from radapter_serve.release.agreement import Agreement, Agreements
from radapter_serve.release.config import check, read_config
from radapter_serve.release.release import Accuracy, MadeOf, Release
from radapter_serve.release.repository import CONFIG as MODEL_CONFIG
from radapter_serve.release.repository import MODELS
from radapter_serve.sources import unreachable
from tests.export.conftest import Export
from tests.helpers.answering import Answer, answering
from tests.helpers.small_models import release
from tests.helpers.small_release import CONFIDENCE, png

TOKEN = "hf_test"


class FakeHub:
    """Repositories by name, each a list of commits."""

    def __init__(self) -> None:
        self.url = ""
        # Commits of each, the newest last: a name of 40 digits, and the files
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        # Statuses in place of an answer, by method and a pattern of the path
        self.answers: dict[tuple[str, str], int] = {}
        self.requests: list[tuple[str, str]] = []  # method and path

    def files(self, name: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        return self.repositories[name][-1][1]

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        oid = hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def answer(self, method: str, path: str, headers: Message, body: bytes) -> Answer:
        self.requests.append((method, path))
        for (method_of_answer, pattern), status in self.answers.items():
            if method == method_of_answer and re.search(pattern, path):
                return status, {}, b""
        if path == "/":
            return 200, {}, b""
        if method == "POST" and headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {}, b""
        if path == "/api/validate-yaml":
            return _json({})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if parts := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path):
            return self._of_model(parts[1], parts[2], parts[3], body)
        if parts := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._of_model(parts[1], "revision", "main", body)
        if parts := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*parts.groups())
        return 404, {}, b""

    def _create(self, request: dict[str, Any]) -> Answer:
        name = f"{request['organization'] or 'someone'}/{request['name']}"
        known = name in self.repositories
        if not known:
            self.commit(name, {".gitattributes": b""})
            if request.get("private") or request.get("visibility") == "private":
                self.private.add(name)
        return _json({"url": f"{self.url}/{name}"}, 409 if known else 200)

    def _of_model(self, name: str, action: str, revision: str, body: bytes) -> Answer:
        commit = self._at(name, revision)
        if commit is None:
            code = "RevisionNotFound" if name in self.repositories else "RepoNotFound"
            return 404, {"X-Error-Code": code}, b""
        oid, files = commit
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            return _json({"id": name, "sha": oid, "siblings": siblings, "tags": []})
        if action == "tree":
            entry = {"type": "file", "size": 1, "oid": "0" * 40}
            return _json([{**entry, "path": file} for file in files])
        if action == "preupload":
            uploads = json.loads(body)["files"]
            known = [{"path": upload["path"], "uploadMode": "regular"} for upload in uploads]
            return _json({"files": [{**upload, "shouldIgnore": False} for upload in known]})
        changed = dict(files)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del changed[line["value"]["path"]]
        digest = self.commit(name, changed)
        url = f"{self.url}/{name}/commit/{digest}"
        return _json({"success": True, "commitOid": digest, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, name: str, revision: str, file: str) -> Answer:
        commit = self._at(name, revision)
        if commit is None or file not in commit[1]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = commit[1][file]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": commit[0]}, data

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        if revision == "main" and commits:
            return commits[-1]
        return {oid: (oid, files) for oid, files in commits}.get(revision)


def _json(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


RELEASE = release(
    3,
    templates=["a photo of a {}.", "art of {}", "{}", "one more {}"],
    agreement=Agreements(
        image_encoder=Agreement(1.2e-6, 1.0), batches=[1], tolerance=1e-4, min_cosine=0.999
    ),
    tools={"torch": "2.13.0"},
    accuracy=Accuracy("imagefolder:/data/secret/photos", 200, "acc1", 71.5, 71.25, 0.25),
    confidence=CONFIDENCE,
)
METADATA = Metadata(
    architecture="ViT-B-32",
    pretrained="openai",
    base_digest="sha256:1",
    recipe={"data": "csv:/home/me/secret/train.csv", "adapt": "towers", "drop": 0.2},
    classes=["cat", "dog"],
    held_out="sha256:ef",
)
CURVE = [
    CurvePoint(0.0, 0.6, 0.115, 0.04, 1.0, {"photos": 0.6}),
    CurvePoint(0.5, 0.715, 0.0, 0.0, 0.9625, {"photos": 0.715}),
]


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_a_card_is_read_by_the_hub_and_says_what_the_release_is(library: str) -> None:
    card = ModelCard(card_of(RELEASE, METADATA, CURVE, library))
    head: Any = card.data
    assert (head.library_name, head.license) == (library, "mit")
    [result] = head.eval_results
    assert (result.dataset_name, result.metric_type) == ("photos", "acc1")
    assert result.metric_value == 71.25
    for words in (
        "| α | kept of the base | photos |",
        "| 0 | 100.0 | 60.0 |",
        "| **0.5** | 96.2 | 71.5 |",
        what_is_kept(0.5, 0.9625)[1:],
        "| data | train.csv |",
        "| adapt | towers |",
    ):
        assert words in card.text
    assert f"import {library}" in card.text.replace("from transformers", "import transformers")
    assert "secret" not in card.content


def test_a_card_leaves_out_unknown_facts() -> None:
    name = "local-dir:/srv/secret/base"
    bare = replace(RELEASE, accuracy=None, confidence=None, architecture=name)
    text = card_of(bare, Metadata(name, "sha256:1"), [], "open_clip")
    head: Any = ModelCard(text).data
    assert head.license is None and head.eval_results is None
    assert "How it was trained" not in text and "to keep" not in text and "secret" not in text
    for kind, words in (("checkpoint", "a checkpoint of it"), ("lora", "a LoRA of it")):
        made_of = MadeOf(kind, "tuned", "ViT-B-32:openai", "sha256:6")
        text = card_of(replace(RELEASE, made_of=made_of), METADATA, [], "open_clip")
        assert words in text and "R-Adapter (" not in text


NAME = "someone/tiny-clip"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that the libraries of this process ask, with a token and an empty cache."""
    hub = FakeHub()
    with answering(hub.answer) as port:
        hub.url = f"http://127.0.0.1:{port}"
        cache = tmp_path / "cache"
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(cache / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        unreachable.cache_clear()
        yield hub
    unreachable.cache_clear()


def send(repository: Path, version: int, merged: Path) -> str:
    """Push a release that is exported already."""
    settings = ExportSettings(model_repository=repository, merged=merged)
    facts = Release.load(repository / "classify" / str(version))
    return push(prepare_push(NAME, 1, "onnxruntime"), facts, settings, "a card")


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_bytes(b"the card of the folder")
    return folder


@pytest.fixture
def pushed(hub: FakeHub, repository: Path, merged: Path) -> str:
    """A release with patches and a label set, on the hub; the name with the commit."""
    return send(repository, 2, merged)


def test_a_pushed_release_is_downloaded_and_opened(
    pushed: str, hub: FakeHub, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is sent with the merged weights and the card, to a private repository.
    files = hub.files(NAME)
    assert {name: data for name, data in files.items() if "/" not in name} == {
        "open_clip_model.safetensors": b"weights",
        "README.md": b"a card",
        ".gitattributes": b"",
    }
    assert {name.removeprefix("release/") for name in files if name.startswith("release/")} == {
        *("release.json", "tokenizer.json", "SHA256SUMS", "label_sets/colours.npz"),
        *(f"{tower}_encoder/model.onnx" for tower in ("image", "text", "patch")),
        *(f"{tower}_encoder/samples.npz" for tower in ("image", "text", "patch")),
    }
    assert hub.private == {NAME}
    assert pushed == f"hf-hub:{NAME}@{hub.repositories[NAME][-1][0]}"

    # It answers as it does here.
    texts = ["a cat", "a dog"]
    local = Model(f"{repository}@2")
    with local, Model(f"hf-hub:{NAME}") as model, Model(pushed) as at_commit:
        expected = local.classify(png(1), label_set="colours")
        assert model.classify(png(1), label_set="colours") == expected
        assert (at_commit.segment(png(1), texts).mask == local.segment(png(1), texts).mask).all()
        assert model.release() == local.release()
    # The folder that comes back is the one that the export wrote, configs included.
    download = download_release(pushed)
    assert download is not None
    check(download, [2])
    for model_name in MODELS:
        config = read_config(repository / model_name / "2" / MODEL_CONFIG)
        assert read_config(download / model_name / MODEL_CONFIG) == config

    # Without the hub the cache is enough, and what was never fetched is named.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    unreachable.cache_clear()
    before = len(hub.requests)
    with Model(f"hf-hub:{NAME}") as model:
        assert model.release().alpha == 0.5
    assert len(hub.requests) == before
    with pytest.raises(RAdapterError, match=r"hf-hub:a/b is not on this machine.*`hf download a/b"):
        Model("hf-hub:a/b")


def test_a_model_repository_on_the_hub_is_never_served(pushed: str, hub: FakeHub) -> None:
    theirs = download_release(pushed)
    assert theirs is not None
    code = b"raise SystemExit('code of the hub')\n"
    hostile = {}
    for path in theirs.rglob("*"):
        for place in ("model_repository", "radapter"):
            if path.is_file():
                data = code if path.suffix == ".py" else path.read_bytes()
                hostile[f"{place}/{path.relative_to(theirs)}"] = data
    assert code in hostile.values()
    oid = hub.commit(NAME, {**hub.files(NAME), **hostile})
    folder = Path(snapshot_download(NAME))  # all of it, as `hf download` brings it
    assert folder.name == oid and (folder / "model_repository" / "classify").is_dir()
    for _ in range(2):  # built, and found again
        download = download_release(f"hf-hub:{NAME}")
        assert download is not None and download != theirs and not download.is_relative_to(folder)
        check(download, [2])
        assert code not in [path.read_bytes() for path in download.rglob("*.py")]


def test_the_next_push_takes_the_place_of_the_last(
    pushed: str, hub: FakeHub, repository: Path, merged: Path
) -> None:
    newer = send(repository, 1, merged)
    files = hub.files(NAME)
    assert not [name for name in files if "patch" in name] and len(files) > 5
    with Model(f"hf-hub:{NAME}") as new, Model(pushed) as old:
        assert (new.release().version, old.release().version) == (1, 2)
    assert newer != pushed


@pytest.mark.slow
def test_the_form_of_transformers_is_pushed(
    hub: FakeHub,
    adapter_path: Path,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--adapter", str(adapter_path), "--alpha", "0.3", "--transformers", "form"]
    assert export_command([*command, "--push", "tiny-clip"]) == 0  # of the own account
    oid = hub.repositories[NAME][-1][0]
    assert f"Pushed: hf-hub:{NAME}@{oid}\n" in capsys.readouterr().out
    files = hub.files(NAME)
    card = files["README.md"].decode()
    assert f'"hf-hub:{NAME}"' in card and "FOLDER" not in card
    assert 'subfolder="transformers"' in card
    assert ModelCard(card).data.get("library_name") == "open_clip"
    form = {path.name for path in Path("form").iterdir()} - {"README.md", "release.json"}
    assert {name.split("/")[-1] for name in files if name.startswith("transformers/")} == form
    assert files["transformers/config.json"] == Path("form", "config.json").read_bytes()


def test_a_hub_that_refuses_a_push(
    hub: FakeHub,
    adapter_path: Path,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--adapter", str(adapter_path), "--alpha", "0.3", "--push", NAME]
    for place, status, message in (
        ("create", 401, "does not know who asks, or has no such repository (401); look at"),
        ("/preupload/", 403, "nothing of it was sent, and the export is complete in"),
    ):
        hub.answers = {("POST", place): status}
        assert export_command(command) == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"radapter-export: error: could not push to {NAME}: ")
        assert message in line
        for folder in ("merged", "model_repository"):
            assert (tmp_path / folder).exists() == (status == 403)
    assert list(hub.files(NAME)) == [".gitattributes"]


def test_a_push_that_cannot_be_is_refused_before_the_export(
    hub: FakeHub, export: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, alphas, settings, message in (
        ("a/b/c", [0.5], {}, "that is not a name of a repository; write ORGANISATION/NAME"),
        (NAME, [0.3, 0.8], {}, "sends one release, and --alpha names 2"),
        (NAME, [0.5], {"runtime": "tensorrt"}, "engine of TensorRT is for one kind of GPU"),
    ):
        with pytest.raises(RAdapterError, match=message):
            export(alphas, push=name, **settings)
    assert not hub.repositories
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        with pytest.raises(RAdapterError, match="log in with: hf auth login"):
            export(push=NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    unreachable.cache_clear()
    with pytest.raises(RAdapterError, match="can't be reached .*nothing was exported"):
        export(push=NAME)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RAdapterError, match="is not on this machine, and the Hugging Face hub"):
        download_release(f"hf-hub:{NAME}")


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("hf-hub:no/thing", {}, "(404)"),
        (f"hf-hub:{NAME}", {("GET", "^/api/models"): 503}, "the hub answers 503; try again later"),
        (f"hf-hub:{NAME}", {}, "holds no release; export one from it with radapter-export"),
    ],
)
def test_names_that_cannot_be_served(
    name: str,
    answers: dict[tuple[str, str], int],
    message: str,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.commit(NAME, {"config.json": b"{}"})
    hub.answers = answers
    assert serve([name, "--engine", "process"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("radapter-serve: error: ") and message in error


BROKEN = {
    "release/image_encoder/model.onnx": (b"no graph", "image_encoder/model.onnx differs"),
    "release/text_encoder/model.onnx": (None, "text_encoder/model.onnx is missing"),
    "release/tokenizer.json": (b"", "tokenizer.json is empty"),
    "release/SHA256SUMS": (None, "SHA256SUMS: No such file"),
    "release/classify/model.py": (
        b"raise SystemExit",
        "model.py is not a part of a release",
    ),
    "release/image_encoder/config.pbtxt": (
        b"backend: 'x'",
        "pbtxt is not a part of a release",
    ),
}


def test_files_that_differ_are_refused_by_name(pushed: str, hub: FakeHub, tmp_path: Path) -> None:
    good = hub.files(NAME)
    for file, (data, message) in BROKEN.items():
        files = {name: content for name, content in good.items() if name != file}
        if data is not None:
            files[file] = data
        oid = hub.commit(NAME, files)
        with pytest.raises(RAdapterError, match=re.escape(message)):
            Model(f"hf-hub:{NAME}@{oid}")
    assert not list((tmp_path / "cache").rglob(BUILT))


def test_facts_that_no_export_writes_are_refused(pushed: str, hub: FakeHub) -> None:
    good = hub.files(NAME)
    facts = good["release/release.json"]
    wrong: dict[str, object] = {
        "version": "../../x",
        "runtime": "python",
        "max_batch_size": -1,
        "label_sets": {"x": 5},
        "tokenizer": {},
    }
    for fact, value in wrong.items():
        changed = json.dumps({**json.loads(facts), fact: value}).encode()
        was, now = (hashlib.sha256(data).hexdigest().encode() for data in (facts, changed))
        sums = good["release/SHA256SUMS"].replace(was, now)
        files = {"release/release.json": changed, "release/SHA256SUMS": sums}
        oid = hub.commit(NAME, {**good, **files})
        message = r"the release.json of .* is broken: |has other facts than an export writes: "
        with pytest.raises(RAdapterError, match=message):
            Model(f"hf-hub:{NAME}@{oid}")


def test_a_cache_on_a_full_disk(pushed: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(RAdapterError, match="No space left"):
            download_release(pushed)
    assert download_release(pushed) is not None
