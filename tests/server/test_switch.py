"""The order of a switch, whatever fails in it, on a stand-in for tritonserver."""

from __future__ import annotations

from typing import Any

import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import ENCODERS
from radapter_serve.server.control import NoAnswer
from radapter_serve.server.models import ModelEntry, parsed
from radapter_serve.server.switch import (
    DRAIN_TIMEOUT_SECONDS,
    Step,
    carry_out,
    check_side_by_side,
    plan_switch,
)
from tests.helpers.fake_clock import FakeClock

NEEDS = {
    "classify": ["image_encoder", "text_encoder"],
    "segment": ["image_encoder", "patch_encoder", "text_encoder"],
}
NEEDS |= {
    "embed_image": ["image_encoder"],
    "embed_text": ["text_encoder"],
    "retrieve": ["embed_image", "embed_text"],
}


def offer(*versions: int, facts: str = "", **tensors: int) -> ModelEntry:
    inputs = "".join(f'input {{ name: "{name}" dims: [{size}] }}' for name, size in tensors.items())
    return ModelEntry(
        (), f'{inputs} parameters {{ key: "release" value: {{ string_value: "{facts}" }} }}'
    ).at(versions)


def models(*versions: int, patches: bool = True) -> dict[str, ModelEntry]:
    found = {name: offer(*versions) for name in ENCODERS if patches or name != "patch_encoder"}
    return found | {name: offer(*versions, facts=str(versions)) for name in TASKS}


class StandIn:
    """A server and its tritonserver: what it loads is what its folder holds then."""

    def __init__(self, offered: dict[str, ModelEntry]) -> None:
        self.offered = dict(offered)
        self.loaded = {name: set(model.versions) for name, model in offered.items()}
        self.leaving: dict[str, set[int]] = {}
        self.steps: list[str] = []
        self.fails: set[int] = set()  # numbers of loads
        self.dies_at = -1
        self.dense = {1, 2, 3}  # releases with patches
        self.control: Any = self
        self.clock = FakeClock()

    def switch(self, new: dict[str, ModelEntry]) -> None:
        """Plan a switch and carry it out."""
        carry_out(plan_switch(self.offered, new), self, lambda line: None, self.clock)

    def put(self, name: str, model: ModelEntry | None) -> None:
        if model is None:
            del self.offered[name]
        else:
            self.offered[name] = model

    def refresh(self) -> None:
        self.live()

    def live(self) -> None:
        if 0 <= self.dies_at <= len(self.steps):
            raise NoAnswer("no answer (connection refused)")

    def load(self, model: str, *, timeout: float) -> None:
        assert timeout > 0
        self.live()
        number = len(self.steps)
        self.steps.append(model)
        if number in self.fails:
            raise RAdapterError("out of memory")
        versions = set(self.offered[model].versions)
        if model in TASKS:
            self.leaving[model] = self.loaded.get(model, set()) - versions
        self.loaded[model] = versions
        self.check()

    def unload(self, model: str, *, timeout: float = 30.0) -> None:
        self.live()
        assert timeout > 0
        self.loaded.pop(model, None)
        self.check()

    def index(self) -> list[dict[str, str]]:
        self.live()
        busy = [name for name, versions in self.leaving.items() if versions]
        if busy:
            self.leaving[busy[0]].pop()  # one call ends after the other
        return [{"name": name, "state": "UNLOADING"} for name in busy]

    def check(self) -> None:
        """What a task that answers, or is about to, calls is there in its own version."""
        for task, needed in NEEDS.items():
            for version in self.loaded.get(task, set()) | self.leaving.get(task, set()):
                for name in needed:
                    if name in ENCODERS and (name != "patch_encoder" or version in self.dense):
                        assert version in self.loaded.get(name, ()), (
                            f"{task} {version} has no {name}"
                        )


def changes(step: Step) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The versions of each model before and after a step."""
    return {
        name: (before.versions if before else (), after.versions if after else ())
        for name, (before, after) in step.changes.items()
    }


def test_a_plan_unloads_tasks_before_the_encoders_that_they_call() -> None:
    dense = models(1)
    plain = {name: model for name, model in models(2, patches=False).items() if name != "segment"}
    tasks, wait, *encoders = plan_switch(dense, plain).clean_up
    assert changes(tasks) == {"segment": ((1,), ())}
    assert wait.drain == set(TASKS)
    assert [changes(step) for step in encoders] == [
        {"patch_encoder": ((1,), ())},
        {"image_encoder": ((1, 2), (2,))},
        {"text_encoder": ((1, 2), (2,))},
    ]
    assert changes(plan_switch(plain, dense).switch[1]) == {"patch_encoder": ((), (1,))}


def test_encoders_keep_their_config_so_that_triton_keeps_running_those_it_has() -> None:
    """Triton loads a version again if more than the version policy and the instances of its config
    change.
    """
    old = models(1)
    new = models(2)
    old["image_encoder"] = offer(1, facts="threads of this server")

    def facts(model: str) -> set[str]:
        plan = plan_switch(old, new)
        return {
            parsed(after.config).parameters["release"].string_value
            for step in (*plan.switch, *plan.clean_up)
            for name, (_, after) in step.changes.items()
            if name == model and after is not None
        }

    assert facts("image_encoder") == {"threads of this server"}
    assert facts("classify") == {"(2,)"}


def test_what_fails_in_cleaning_up_leaves_the_new_release_served() -> None:
    """More stays loaded than is needed, and the rest of the plan is carried out."""
    server = StandIn(models(1))
    new = models(2)
    server.fails = {len(new)}
    server.switch(new)
    assert server.offered == new
    assert [set(server.loaded[name]) for name in TASKS] == [{2}] * len(TASKS)
    assert sorted(map(len, (server.loaded[name] for name in ENCODERS))) == [1, 1, 2]


def test_calls_that_never_end_hold_up_the_old_encoders_for_a_bounded_time() -> None:
    class Stuck(StandIn):
        def index(self) -> list[dict[str, str]]:
            return [{"name": "classify", "state": "UNLOADING"}]

        def check(self) -> None:
            pass

    server = Stuck(models(1))
    new = models(2)
    server.switch(new)
    assert server.offered == new
    assert sum(server.clock.slept) == pytest.approx(DRAIN_TIMEOUT_SECONDS, abs=1)


@pytest.mark.parametrize(
    ("before", "after"), [((1,), (2,)), ((2,), (1,)), ((1, 2), (3,)), ((3,), (2, 3))]
)
def test_every_task_has_its_encoders_at_every_moment(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    server = StandIn(models(*before))
    new = models(*after)
    server.switch(new)
    assert server.offered == new
    assert server.loaded == {name: set(after) for name in new}
    assert not any(server.leaving.values())
    first = server.steps[: len(ENCODERS)]
    assert first == list(ENCODERS) and set(server.steps[len(ENCODERS) : len(new)]) == set(TASKS)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_a_model_that_only_one_release_has(before: bool, after: bool) -> None:
    server = StandIn(models(1, patches=before))
    new = models(2, patches=after)
    server.dense = {1} if before else {2}
    server.switch(new)
    assert server.offered == new and server.loaded == {name: {2} for name in new}


@pytest.mark.parametrize("number", range(len(models(1))))
def test_whatever_does_not_load_all_is_as_it_was(number: int) -> None:
    old = models(1)
    server = StandIn(old)
    server.fails = {number}
    with pytest.raises(RAdapterError, match="does not load: out of memory"):
        server.switch(models(2))
    assert server.offered == old
    assert server.loaded == {name: {1} for name in old}


@pytest.mark.parametrize("steps", range(len(models(1)) + len(ENCODERS)))
def test_a_server_that_dies_comes_back_with_one_release_as_a_whole(steps: int) -> None:
    """Before the last task is loaded with the old one, from then on with the new one."""
    old = models(1)
    new = models(2)
    server = StandIn(old)
    server.dies_at = steps
    if steps <= len(old):
        with pytest.raises(RAdapterError, match="no answer"):
            server.switch(new)
        assert server.offered == old
    else:
        server.switch(new)
        assert server.offered == new


def test_encoders_of_other_shapes_cannot_be_loaded_side_by_side() -> None:
    first = {"image_encoder": offer(1, image=8)}
    check_side_by_side(first, {"image_encoder": offer(2, image=8)})
    with pytest.raises(RAdapterError, match=r"image_encoder .* its inputs have other shapes"):
        check_side_by_side(first, {"image_encoder": offer(2, image=16)})
