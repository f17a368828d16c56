"""Names of adapters that nobody has, and broken or foreign files beside the adapters: a request is
refused, and learns nothing of the disk, while others are answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from radapter_client import RAdapterClientError, Request
from radapter_serve.contract.errors import TaskError
from radapter_serve.release.adapters import AdapterFacts, add, read_list
from radapter_serve.release.release import Release
from radapter_serve.release.repository import MODELS
from tests.helpers.fake_upstream import INFER, serving
from tests.helpers.ways import ASKING, Ask

NAMES = [
    "..",
    ".",
    "/",
    "../anna",
    "anna/../anna",
    "anna/adapter.json",
    "anna\0",
    "\0",
    "anna@{digest}",
    ".new",
    "served.json",
    "foreign",
    "linked",
    "\u202eanna",
    "ann\u0430",  # the last letter is Cyrillic
    "anna ",
    "ANNA",
    "%2e%2e",
    "{}",
    "x" * 10_000,
    "\U0001f600" * 2_500,
]


def ask_for(ask: Ask, *names: str) -> np.ndarray:
    columns = {
        "text": np.array([[b"a cat"]] * len(names), object),
        "adapter": np.array([[name.encode()] for name in names], object),
    }
    return np.asarray(ask(Request("infer", "embed_text", inputs=columns)).outputs["text_embeds"])


@pytest.fixture
def repository(sealed: Path) -> Path:
    """Release 2 with an adapter `anna`, and files of others in its folder."""
    release = Release.load(sealed / MODELS[-1] / "2")
    width = release.embed_dim
    facts = AdapterFacts(release.text_tower.digest(release.alpha), width, alpha=0.5)
    entry = add(sealed, "anna", facts, (np.eye(width, dtype=np.float32)[::-1].copy(),))
    folder = sealed / "adapters"
    shutil.copytree(folder / entry.folder, folder / "foreign")
    (folder / "linked").symlink_to("/etc")
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    os.mkfifo(folder / "pipe")
    return sealed


each_way = pytest.mark.parametrize(
    "way",
    [
        "engine",
        "process",
        pytest.param("triton-http", marks=pytest.mark.triton),
        pytest.param("triton-grpc", marks=pytest.mark.triton),
    ],
)


@each_way
def test_a_name_that_nobody_has_is_unknown(repository: Path, tmp_path: Path, way: str) -> None:
    digest = read_list(repository)["anna"].folder.partition("@")[2]
    with ASKING[way](repository, tmp_path / "indexes") as ask:
        expected = ask_for(ask, "anna")
        for name in NAMES:
            name = name.replace("{digest}", digest)
            for names in ([name], ["anna", name]):
                with pytest.raises((TaskError, RAdapterClientError)) as error:
                    ask_for(ask, *names)
                code = getattr(error.value, "code", None)
                assert code == "unknown_adapter", (name[:20], error.value)
                said = str(error.value)
                assert len(said) < 400
                assert not any(word in said for word in (str(repository), "etc", "Traceback"))
        np.testing.assert_array_equal(ask_for(ask, "anna"), expected)
    assert {*read_list(repository)} == {"anna"}


def _link(target: str, path: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 4),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 4),
    "endless": lambda path: os.truncate(path, 2**40),
    "a link": partial(_link, "/etc/passwd"),
    "a device": partial(_link, "/dev/zero"),
    "a circle": partial(_link, "matrix.npy"),
    "a pipe": _pipe,
    "a folder": _folder,
    "gone": Path.unlink,
}


@each_way
def test_an_adapter_with_broken_files_is_refused_alone(
    repository: Path, tmp_path: Path, way: str
) -> None:
    entry = read_list(repository)["anna"]
    factor = np.load(repository / "adapters" / entry.folder / "matrix.npy")
    facts = AdapterFacts(entry.text_tower, len(factor), alpha=0.5)
    with ASKING[way](repository, tmp_path / "indexes") as ask:
        expected = ask_for(ask, "anna")
        for file in ("matrix.npy", "adapter.json"):
            for damage, spoil in DAMAGES.items():
                added = add(repository, "bob", facts, (factor,), replace=True)
                spoil(repository / "adapters" / added.folder / file)
                with pytest.raises((TaskError, RAdapterClientError)) as error:
                    ask_for(ask, "bob")
                said = str(error.value)
                assert getattr(error.value, "code", None) == "adapter_failed", (file, damage, said)
                assert "'bob' is damaged" in said and len(said) < 400
                assert not any(word in said for word in (str(repository), "etc", "Traceback"))
                np.testing.assert_array_equal(ask_for(ask, "anna"), expected)
        add(repository, "bob", facts, (factor,), replace=True)
        np.testing.assert_array_equal(ask_for(ask, "bob"), expected)


def test_a_key_can_not_tell_an_adapter_of_others_from_none(tmp_path: Path) -> None:
    """Whether a guessed name is served or not, the answer differs in the name alone."""
    keys = tmp_path / "keys"
    keys.write_text(f"ann: {hashlib.sha256(b'ann').hexdigest()} adapters=anna\n")
    repository = tmp_path / "repository"
    for name in ("anna", "secret"):
        facts = AdapterFacts("sha256:" + "a" * 64, 4, alpha=0.5)
        add(repository, name, facts, (np.eye(4, dtype=np.float32),))
    with serving(api_keys=keys, model_repository=repository) as served:

        def answers(name: str) -> list[str]:
            column = {"shape": [1, 1], "datatype": "BYTES"}
            inputs = [
                {**column, "name": "text", "data": ["abc"]},
                {**column, "name": "adapter", "data": [name]},
            ]
            said = []
            for path, body in (
                (INFER, {"inputs": inputs}),
                ("/v1/embeddings", {"model": name, "input": "a"}),
                ("/v1/embeddings", {"model": f"radapter:{name}", "input": "a"}),
                (f"/v1/models/{name}", None),
            ):
                status, answer, _ = served.ask(path, body, Authorization="Bearer ann")
                said.append(f"{status} {json.dumps(answer)}".replace(name, "NAME"))
            return said

        assert answers("secret") == answers("sekret")
        assert not served.upstream.asked
