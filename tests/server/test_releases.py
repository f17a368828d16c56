"""`radapter-release` without a server, what a server loads, and who may change its releases."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from radapter_serve.cli.release import lacking, main
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import encoders_of, named_releases, parsed
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import ENCODERS, Served
from radapter_serve.server import releases
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.launch import MODELS, put
from radapter_serve.server.models import ModelEntry, check_repository, plan_models
from radapter_serve.server.releases import (
    MAX_CALLERS,
    AdminSocket,
    ReleaseServer,
    Say,
    ask,
)
from tests.helpers.indexes import write_facts


def test_a_repository_without_a_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match="does not exist; make it with: radapter-export"):
        check_repository(tmp_path / "none")
    (tmp_path / "classify" / "1").mkdir(parents=True)
    with pytest.raises(RAdapterError, match="holds no release"):
        check_repository(tmp_path)
    (tmp_path / "classify" / "config.pbtxt").touch()
    check_repository(tmp_path)


def test_without_a_server_the_next_start_is_chosen(
    sealed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model-repository", str(sealed)]
    assert main(["load", "1", *where]) == 0
    assert "from its next start on, release 1 is served" in capsys.readouterr().out
    assert Served.load(sealed) == Served((1,), (1, 2))
    assert main(["rollback", *where]) == 0
    assert main(["list", *where]) == 0
    table = capsys.readouterr().out
    assert "yes, by default" in table and "no server runs here" in table
    (sealed / "text_encoder" / "1" / "model.onnx").write_bytes(b"")
    for words, message in (
        (["load", "1"], "text_encoder/1/model.onnx is empty"),
        (["load", "9"], "no release 9"),
        (["list", "--url", "http://localhost:1"], "no server of"),
        (["list", "--url", "http://example.org"], "a server on this machine"),
    ):
        assert main([*words, *where]) == 2
        assert message in capsys.readouterr().err
    assert Served.load(sealed).releases == (1, 2)


def test_tasks_name_the_releases_that_are_served_and_encoders_none(sealed: Path) -> None:
    encoders = {one.name: one.configured("onnxruntime", 1) for one in encoders_of(sealed, [1])}
    found = plan_models(sealed, [1], encoders)
    assert list(found) == [name for name in (*ENCODERS, *TASKS) if name != "patch_encoder"]
    for name, model in found.items():
        config = parsed(model.config)
        assert list(config.version_policy.specific.versions) == [1]
        if name in TASKS:
            assert list(named_releases(config)) == [1]
            assert json.loads(config.parameters["release"].string_value)["version"] == 1
        else:
            assert not [key for key in config.parameters if key.startswith("release")]


def test_a_switch_names_the_indexes_that_lose_their_release(sealed: Path, tmp_path: Path) -> None:
    digests = {number: encoders_of(sealed, [number])[0].facts.digest for number in (1, 2)}
    indexes = tmp_path / "indexes"
    assert lacking(sealed, [1], [2], indexes) == []
    write_facts(indexes / "fötos", digests[1])
    write_facts(indexes / "of another", "sha256:elsewhere")
    write_facts(indexes / "new", digests[2])
    (indexes / "broken").mkdir()
    (indexes / "broken" / "index.json").write_text("{")
    [note] = lacking(sealed, [1], [2], indexes)
    assert "the index fötos is of release 1" in note
    assert "radapter-release load 1 2 serves both" in note
    assert lacking(sealed, [1], [1, 2], indexes) == []


def test_the_folder_of_a_server_holds_what_is_offered_and_the_repository_stays(
    sealed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "server"
    before = sorted(sealed.rglob("*"))
    for versions in ((1,), (1, 2), (2,)):
        for name in ("image_encoder", "classify"):
            put(folder, sealed, name, ModelEntry((), "").at(versions))
            model = folder / MODELS / name
            assert {path.name for path in model.iterdir()} == {"config.pbtxt", *map(str, versions)}
            for version in map(str, versions):
                names = {path.name for path in (model / version).iterdir()} - {"__pycache__"}
                assert names == {path.name for path in (sealed / name / version).iterdir()}
    # A file where Python would compile model.py.
    assert (folder / MODELS / "classify" / "2" / "__pycache__").is_file()
    put(folder, sealed, "classify", None)
    assert not (folder / MODELS / "classify").exists()
    assert sorted(sealed.rglob("*")) == before


class Server(ReleaseServer):
    """Takes over what it is asked for."""

    def _take_over(self, wanted: Served, say: Say) -> None:
        say("taking over")


@pytest.fixture
def admin(sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(releases, "READ_TIMEOUT_SECONDS", 0.5)
    server = Server(ServerConfig(sealed))
    server.served = Served((2,))
    with AdminSocket(tmp_path, server):
        yield server


def port_of(folder: Path) -> int:
    [file] = folder.glob("release-*")
    return int(file.name.split("-")[1])


@pytest.mark.parametrize(
    "request_line",
    [
        b"",
        b"{",
        b"[]",
        b'{"do": "load", "releases": [1]}\n',
        b'{"do": "load", "releases": [1], "secret": ""}\n',
        b'{"do": "load", "releases": [1], "secret": "\xc3\xa9"}\n',
        b"[" * 100_000,
    ],
)
def test_nobody_without_the_secret_changes_releases(
    admin: Server, tmp_path: Path, request_line: bytes
) -> None:
    stranger = socket.create_connection(("127.0.0.1", port_of(tmp_path)), 10)
    with stranger, contextlib.suppress(OSError):  # it may be cut off before it has sent all
        stranger.sendall(request_line)
        stranger.shutdown(socket.SHUT_WR)
        answer = stranger.makefile("rb").readline()
        assert not answer or "error" in json.loads(answer)
    assert admin.served == Served((2,))


def test_silent_callers_hold_up_nobody_for_long(admin: Server, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2 * MAX_CALLERS):
            address = ("127.0.0.1", port_of(tmp_path))
            stack.enter_context(socket.create_connection(address, 10))
        deadline = time.monotonic() + 15
        while True:
            with contextlib.suppress(RAdapterError, OSError):
                state = ask(tmp_path, {"do": "state"})
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert state["releases"] == [2]
    lines: list[str] = []
    request = {"do": "load", "releases": [1]}
    assert ask(tmp_path, request, lines.append) == "release 1 is served"
    assert lines[-1] == "taking over" and admin.served == Served((1,), (2,))
    assert Served.load(admin.config.model_repository) == admin.served


def test_one_change_at_a_time(admin: Server) -> None:
    def change_again(line: str) -> None:
        with pytest.raises(RAdapterError, match="changes its releases already"):
            admin.load([1, 2])

    assert admin.load([1], change_again) == "release 1 is served"
    assert admin.load([2]) == "release 2 is served"
