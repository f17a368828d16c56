"""The order of a switch, whatever fails in it, on a stand-in for tritonserver."""

from __future__ import annotations

from typing import Any

import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import parsed
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import ENCODERS
from radapter_serve.server.control import (
    DRAIN_TIMEOUT_SECONDS,
    Answer,
    NoAnswer,
    check_side_by_side,
    switch,
)
from radapter_serve.server.models import ModelEntry
from tests.helpers.fake_clock import FakeClock

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


class Server:
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
    server = Server(models(*before))
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
    server = Server(states[1])
    server.dense = {dense}
    server.switch(states[2])
    assert server.offered == states[2]
    assert server.loaded == {name: {2} for name in states[2]}


def test_encoders_keep_their_config_so_that_triton_keeps_running_them() -> None:
    """Triton loads a version again if more than the version policy and the instances of its config
    change.
    """
    old = models(1)
    old["image_encoder"] = entry(1, facts="threads of this server")
    server = Server(old)
    server.switch(models(2))
    assert server.configs["image_encoder"] == {"threads of this server"}
    assert server.configs["classify"] == {"(2,)"}


def test_what_fails_in_cleaning_up_leaves_the_new_release_served() -> None:
    """More stays loaded than is needed, and the later steps are taken."""
    server = Server(models(1))
    new = models(2)
    server.fails = {len(new)}
    server.switch(new)
    assert server.offered == new
    assert [server.loaded[name] for name in TASKS] == [{2}] * len(TASKS)
    assert sorted(len(server.loaded[name]) for name in ENCODERS) == [1, 1, 2]


def test_calls_that_never_end_hold_up_the_old_encoders_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(models(1))
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
    server = Server(old)
    vars(server).update(change)
    with pytest.raises(RAdapterError, match=message):
        server.switch(models(2))
    assert server.offered == old
    assert server.loaded == {name: {1} for name in old}
    assert server.wrong == "" or not set(server.loads) & set(TASKS)  # no caller has got it


@pytest.mark.parametrize("loads", range(len(models(1)) + len(ENCODERS)))
def test_a_server_that_dies_comes_back_with_one_release_as_a_whole(loads: int) -> None:
    """Before the last task is loaded with the old one, from then on with the new one."""
    old = models(1)
    new = models(2)
    server = Server(old)
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
