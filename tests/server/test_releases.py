"""Which releases a server loads, who may change them, and the order of a switch."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.cli.release import lacking, main
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import encoders_of, named_releases, parsed
from radapter_serve.release.release import TASKS, Release
from radapter_serve.release.repository import ENCODERS, Served, check_repository
from radapter_serve.server import releases
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.control import (
    DRAIN_TIMEOUT_SECONDS,
    Answer,
    NoAnswer,
    check_side_by_side,
    switch,
)
from radapter_serve.server.launch import MODELS_FOLDER, put
from radapter_serve.server.models import ModelEntry, plan_models
from radapter_serve.server.releases import (
    MAX_CALLERS,
    ReleaseServer,
    Say,
    admin_socket,
    ask,
)
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_upstream import until
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
    # A terminal would obey the escape codes of a release that others made.
    for path in sealed.glob("classify/*/release.json"):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(facts | {"precision": "\x1b[2J"}))
    assert main(["list", *where]) == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table and "\\u001b" in table


def test_tasks_name_the_releases_that_are_served_and_encoders_none(repository: Path) -> None:
    encoders = {
        encoder.name: encoder.configured("onnxruntime", 1)
        for encoder in encoders_of(repository, [1])
    }
    facts = Release.load(repository / "classify" / "1").computed_in("bf16")
    planned = plan_models(repository, [1], encoders, {1: facts})
    assert list(planned) == [name for name in (*ENCODERS, *TASKS) if name != "patch_encoder"]
    for name, model in planned.items():
        config = parsed(model.config)
        assert list(config.version_policy.specific.versions) == [1]
        if name in TASKS:
            assert named_releases(config) == {1: facts}
            assert json.loads(config.parameters["release"].string_value)["version"] == 1
        else:
            assert not [key for key in config.parameters if key.startswith("release")]


def test_a_switch_names_the_indexes_that_lose_their_release(
    repository: Path, tmp_path: Path
) -> None:
    digests = {number: encoders_of(repository, [number])[0].facts.image_digest for number in (1, 2)}
    indexes = tmp_path / "indexes"
    assert lacking(repository, [1], [2], indexes) == []
    write_facts(indexes / "fötos", digests[1])
    write_facts(indexes / "of another", "sha256:elsewhere")
    write_facts(indexes / "new", digests[2])
    (indexes / "broken").mkdir()
    (indexes / "broken" / "index.json").write_text("{")
    [note] = lacking(repository, [1], [2], indexes)
    assert "the index fötos is of release 1" in note
    assert "radapter-release load 1 2 serves both" in note
    assert lacking(repository, [1], [1, 2], indexes) == []


def test_the_folder_of_a_server_holds_what_is_offered_and_the_repository_stays(
    repository: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "server"
    before = sorted(repository.rglob("*"))
    for versions in ((1,), (1, 2), (2,)):
        for name in ("image_encoder", "classify"):
            put(folder, repository, name, ModelEntry((), "").at(versions))
            model = folder / MODELS_FOLDER / name
            assert {path.name for path in model.iterdir()} == {"config.pbtxt", *map(str, versions)}
            for version in map(str, versions):
                names = {path.name for path in (model / version).iterdir()} - {"__pycache__"}
                assert names == {path.name for path in (repository / name / version).iterdir()}
    # A file where Python would compile model.py.
    assert (folder / MODELS_FOLDER / "classify" / "2" / "__pycache__").is_file()
    put(folder, repository, "classify", None)
    assert not (folder / MODELS_FOLDER / "classify").exists()
    assert sorted(repository.rglob("*")) == before


class Server(ReleaseServer):
    """Takes over what it is asked for."""

    def _take_over(self, wanted: Served, say: Say) -> None:
        say("taking over")


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of two releases that have no files to be checked."""
    monkeypatch.setattr(releases, "READ_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(releases, "check", lambda *_: None)
    for version in ("1", "2"):
        (tmp_path / "classify" / version).mkdir(parents=True)
        (tmp_path / "classify" / version / "release.json").touch()
    server = Server(ServerConfig(tmp_path))
    server.served = Served((2,))
    with admin_socket(tmp_path, server):
        yield server


def test_strangers_change_no_releases_and_hold_up_nobody_for_long(
    admin: Server, tmp_path: Path
) -> None:
    [file] = tmp_path.glob("release-*")
    address = ("127.0.0.1", int(file.name.split("-")[1]))
    for line in (
        b"",
        b"{",
        b"[]",
        b'{"do": "load", "releases": [1]}\n',
        b'{"do": "load", "releases": [1], "secret": ""}\n',
        b'{"do": "load", "releases": [1], "secret": "\xc3\xa9"}\n',
        b"[" * 100_000,
    ):
        stranger = socket.create_connection(address, 10)
        with stranger, contextlib.suppress(OSError):  # it may be cut off before it has sent all
            stranger.sendall(line)
            stranger.shutdown(socket.SHUT_WR)
            answer = stranger.makefile("rb").readline()
            assert not answer or "error" in json.loads(answer)
    assert admin.served == Served((2,))

    def state() -> dict[str, Any]:
        with contextlib.suppress(RAdapterError, OSError):
            answer: dict[str, Any] = ask(tmp_path, {"do": "state"})
            return answer
        return {}

    with contextlib.ExitStack() as stack:
        for _ in range(2 * MAX_CALLERS):
            stack.enter_context(socket.create_connection(address, 10))
        until(lambda: state().get("releases") == [2], 15)


def test_one_change_at_a_time(admin: Server, tmp_path: Path) -> None:
    lines: list[str] = []
    request = {"do": "load", "releases": [1]}
    assert ask(tmp_path, request, lines.append) == "release 1 is served"
    assert lines == ["taking over"] and admin.served == Served((1,), (2,))
    assert Served.load(tmp_path) == admin.served

    def change_again(line: str) -> None:
        with pytest.raises(RAdapterError, match="changes its releases already"):
            admin.load([2])

    assert admin.load([1, 2], change_again) == "release 1, 2 is served"
    assert admin.load([2]) == "release 2 is served"


# The order of a switch

NEEDS = {
    "classify": ["image_encoder", "text_encoder"],
    "segment": ["image_encoder", "patch_encoder", "text_encoder"],
    "embed_image": ["image_encoder"],
    "embed_text": ["text_encoder"],
    "retrieve": [],
}


def entry(*versions: int, facts: str = "", **tensors: int) -> ModelEntry:
    inputs = "".join(f'input {{ name: "{name}" dims: [{size}] }}' for name, size in tensors.items())
    return ModelEntry(
        (), f'{inputs} parameters {{ key: "release" value: {{ string_value: "{facts}" }} }}'
    ).at(versions)


def models(*versions: int, patches: bool = True) -> dict[str, ModelEntry]:
    encoders = {name: entry(*versions) for name in ENCODERS if patches or name != "patch_encoder"}
    return encoders | {name: entry(*versions, facts=str(versions)) for name in TASKS}


class Switched:
    """A server and its tritonserver, which loads what the server's folder holds then."""

    def __init__(self, offered: dict[str, ModelEntry]) -> None:
        self.offered = dict(offered)
        self.loaded = {name: set(model.versions) for name, model in offered.items()}
        self.leaving: dict[str, set[int]] = {}
        self.loads: list[str] = []
        self.configs: dict[str, set[str]] = {name: set() for name in (*ENCODERS, *TASKS)}
        self.fails: set[int] = set()  # numbers of loads
        self.wrong = ""  # what the comparison with torch says
        self.status = 200  # of tasks that are asked
        self.dies_at = -1
        self.dense = {1, 2, 3}  # releases with patches
        self.control: Any = self
        self.clock = FakeClock()

    def switch(self, new: dict[str, ModelEntry]) -> None:
        switch(self, new, self.compare, lambda line: None, self.clock)

    def compare(self) -> None:
        if self.wrong:
            raise RAdapterError(self.wrong)

    def ask(self, path: str, body: Any, *, timeout: float) -> Answer:
        self.refresh()
        return Answer(self.status, {"error": "no vocabulary"})

    def put(self, name: str, model: ModelEntry | None) -> None:
        if model is None:
            del self.offered[name]
        else:
            self.offered[name] = model
            facts = parsed(model.config).parameters["release"].string_value
            self.configs[name].add(facts)

    def refresh(self) -> None:
        if 0 <= self.dies_at <= len(self.loads):
            raise NoAnswer("no answer (connection refused)")

    def load(self, model: str, *, timeout: float) -> None:
        self.refresh()
        number = len(self.loads)
        self.loads.append(model)
        if number in self.fails:
            raise RAdapterError("out of memory")
        versions = set(self.offered[model].versions)
        if model in TASKS:
            self.leaving[model] = self.loaded.get(model, set()) - versions
        self.loaded[model] = versions
        self.check()

    def unload(self, model: str) -> None:
        self.refresh()
        self.leaving[model] = self.loaded.pop(model) if model in TASKS else set()
        self.loaded.pop(model, None)
        self.check()

    def index(self) -> list[dict[str, str]]:
        self.refresh()
        busy = [name for name, versions in self.leaving.items() if versions]
        if busy:
            self.leaving[busy[0]].pop()  # one call ends after the other
        return [{"name": name, "state": "UNLOADING"} for name in busy]

    def check(self) -> None:
        """Each task that answers has the encoders that it calls in its own version."""
        for task, needed in NEEDS.items():
            for version in self.loaded.get(task, set()) | self.leaving.get(task, set()):
                for name in needed:
                    if name != "patch_encoder" or version in self.dense:
                        assert version in self.loaded.get(name, ()), f"{task} {version}: {name}"


@pytest.mark.parametrize(
    ("before", "after"), [((1,), (2,)), ((2,), (1,)), ((1, 2), (3,)), ((3,), (2, 3))]
)
def test_every_task_has_its_encoders_at_every_moment(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    server = Switched(models(*before))
    new = models(*after)
    server.switch(new)
    assert server.offered == new
    assert server.loaded == {name: set(after) for name in new}
    assert not any(server.leaving.values())
    first = server.loads[: len(ENCODERS)]
    assert first == list(ENCODERS) and set(server.loads[len(ENCODERS) : len(new)]) == set(TASKS)


@pytest.mark.parametrize("dense", [1, 2])
def test_models_that_only_one_release_has(dense: int) -> None:
    plain = models(3 - dense, patches=False)
    del plain["segment"]
    states = {dense: models(dense), 3 - dense: plain}
    server = Switched(states[1])
    server.dense = {dense}
    server.switch(states[2])
    assert server.offered == states[2]
    assert server.loaded == {name: {2} for name in states[2]}


def test_encoders_keep_their_config_so_that_triton_keeps_running_them() -> None:
    """Triton loads a version again if more than the versions and the instances change."""
    old = models(1)
    old["image_encoder"] = entry(1, facts="threads of this server")
    server = Switched(old)
    server.switch(models(2))
    assert server.configs["image_encoder"] == {"threads of this server"}
    assert server.configs["classify"] == {"(2,)"}


def test_what_fails_in_cleaning_up_leaves_the_new_release_served() -> None:
    """More stays loaded than is needed, and the later steps are taken."""
    server = Switched(models(1))
    new = models(2)
    server.fails = {len(new)}
    server.switch(new)
    assert server.offered == new
    assert [server.loaded[name] for name in TASKS] == [{2}] * len(TASKS)
    assert sorted(len(server.loaded[name]) for name in ENCODERS) == [1, 1, 2]


def test_calls_that_never_end_hold_up_the_old_encoders_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Switched(models(1))
    new = models(2)
    stuck = [{"name": "classify", "state": "UNLOADING"}]
    monkeypatch.setattr(server, "index", lambda: stuck)
    monkeypatch.setattr(server, "check", lambda: None)
    server.switch(new)
    assert server.offered == new
    assert sum(server.clock.slept) == pytest.approx(DRAIN_TIMEOUT_SECONDS, abs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"fails": {number}}, "does not load: out of memory")
            for number in range(len(models(1)))
        ),
        ({"wrong": "differs from torch"}, "differs from torch"),
        ({"status": 500}, "version 2 fails: no vocabulary"),
    ],
)
def test_whatever_fails_all_is_as_it_was(change: dict[str, Any], message: str) -> None:
    old = models(1)
    server = Switched(old)
    vars(server).update(change)
    with pytest.raises(RAdapterError, match=message):
        server.switch(models(2))
    assert server.offered == old
    assert server.loaded == {name: {1} for name in old}
    assert server.wrong == "" or not set(server.loads) & set(TASKS)  # no caller has got it


@pytest.mark.parametrize("loads", range(len(models(1)) + len(ENCODERS)))
def test_a_server_that_dies_comes_back_with_one_release_as_a_whole(loads: int) -> None:
    """It is the old one until the last task is loaded, and the new one from then on."""
    old = models(1)
    new = models(2)
    server = Switched(old)
    server.dies_at = loads
    if loads <= len(old):
        with pytest.raises(RAdapterError, match="no answer"):
            server.switch(new)
        assert server.offered == old
    else:
        server.switch(new)
        assert server.offered == new


def test_encoders_of_other_shapes_cannot_be_loaded_side_by_side() -> None:
    first = {"image_encoder": entry(1, image=8)}
    check_side_by_side(first, {"image_encoder": entry(2, image=8)})
    with pytest.raises(RAdapterError, match=r"image_encoder .* its inputs have other shapes"):
        check_side_by_side(first, {"image_encoder": entry(2, image=16)})
