"""The order of a switch, whatever fails in it, on a stand-in for tritonserver; and what a
repository remembers.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from radapter_serve.cli.release import main
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import encoders_of, named_releases
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import ENCODERS
from radapter_serve.release.served import Served
from radapter_serve.server.control import NoAnswer, ServedVersion
from radapter_serve.server.launch import MODELS, put
from radapter_serve.server.models import ModelEntry, kept_for_indexes, parsed, plan_models
from radapter_serve.server.releases import Releases, previous, require_known
from radapter_serve.server.switch import (
    DRAIN_TIMEOUT_SECONDS,
    Change,
    Plan,
    Step,
    carry_out,
    check_side_by_side,
    plan_switch,
)
from tests.helpers.fake_clock import FakeClock
from tests.helpers.indexes import write_facts
from tests.helpers.small_release import seal

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
        self.control = self
        self.clock = FakeClock()

    def switch(self, new: dict[str, ModelEntry]) -> None:
        """Plan a switch and carry it out."""
        carry_out(plan_switch(self.offered, new), self, lambda line: None, self.clock)

    def put(self, name: str, model: ModelEntry | None) -> None:
        if model is None:
            del self.offered[name]
        else:
            self.offered[name] = model

    def refresh_shared_memory(self) -> None:
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

    def index(self, *, ready: bool = False) -> list[ServedVersion]:
        self.live()
        assert not ready
        going = [
            ServedVersion(name, one, "UNLOADING")
            for name, those in self.leaving.items()
            for one in those
        ]
        if going:
            self.leaving[going[0].model].discard(going[0].version)  # one call ends after the other
        return going

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
        change.model: (
            change.before.versions if change.before else (),
            change.after.versions if change.after else (),
        )
        for change in step.changes
    }


def test_a_plan_adds_encoders_then_changes_tasks_at_once_then_removes_old_encoders() -> None:
    plan = plan_switch(models(1), models(2))
    *encoders, tasks = plan.switch
    assert [changes(step) for step in encoders] == [{name: ((1,), (1, 2))} for name in ENCODERS]
    assert changes(tasks) == dict.fromkeys(TASKS, ((1,), (2,)))
    wait, *encoders = plan.clean_up
    assert wait.drain == set(TASKS)
    assert changes(wait) == {}
    assert [changes(step) for step in encoders] == [{name: ((1, 2), (2,))} for name in ENCODERS]


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


@pytest.mark.parametrize("begun", range(1, len(ENCODERS) + 2))
def test_a_plan_is_undone_in_reverse_and_encoders_wait_for_the_tasks_that_were_changed(
    begun: int,
) -> None:
    plan = plan_switch(models(1), models(2))
    undo = plan.roll_back(begun)
    expected = [
        {name: (after, before) for name, (before, after) in changes(step).items()}
        for step in plan.switch
    ]
    assert [changes(step) for step in undo] == expected[begun - 1 :: -1]
    tasks_changed = begun == len(plan.switch)
    drains = [set(step.drain) for step in undo]
    assert drains == ([set(), *[set(TASKS)] * len(ENCODERS)] if tasks_changed else [set()] * begun)


def test_a_change_that_changes_nothing_is_not_undone() -> None:
    same = offer(1)
    plan = Plan((Step("", (Change("classify", same, same), Change("segment", same, None))),), ())
    assert [changes(step) for step in plan.roll_back(1)] == [{"segment": ((), (1,))}]


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
            parsed(change.after.config).parameters["release"].string_value
            for step in (*plan.switch, *plan.clean_up)
            for change in step.changes
            if change.model == model and change.after is not None
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
        def index(self, *, ready: bool = False) -> list[ServedVersion]:
            return [ServedVersion("classify", 1, "UNLOADING")]

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


def test_encoders_of_other_shapes_cannot_stand_side_by_side() -> None:
    check_side_by_side({"image_encoder": offer(1, image=8)}, {"image_encoder": offer(2, image=8)})
    with pytest.raises(
        RAdapterError, match=r"image_encoder .* its inputs have other shapes .*; stop the server"
    ):
        check_side_by_side(
            {"image_encoder": offer(1, image=8)}, {"image_encoder": offer(2, image=16)}
        )


# What a repository and its indexes say


@pytest.fixture
def sealed(repository: Path, tmp_path: Path) -> Path:
    shutil.copytree(repository, tmp_path / "repository")
    seal(tmp_path / "repository", 1, 2)
    return tmp_path / "repository"


def test_the_newest_export_is_served_until_somebody_chooses(sealed: Path) -> None:
    assert Served.load(sealed) == Served((1, 2))  # of one export
    chosen = Served.load(sealed).next([1])
    assert chosen == Served((1,), (1, 2))
    chosen.save(sealed)
    assert Served.load(sealed) == chosen
    assert previous(chosen) == Served((1, 2), (1,))
    with pytest.raises(RAdapterError, match="no release was served before"):
        previous(Served((1,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "could not read"),
        ('{"releases": 1, "before": []}', "could not read"),
        ('{"releases": ["x"], "before": []}', "could not read"),
        ('{"releases": [], "before": []}', "says that release none is served"),
        (
            '{"releases": [7], "before": []}',
            "says that release 7 is served, and .* holds 1, 2; choose one",
        ),
    ],
)
def test_what_served_json_says_may_be_broken(sealed: Path, text: str, message: str) -> None:
    (sealed / "served.json").write_text(text)
    with pytest.raises(RAdapterError, match=message):
        Served.load(sealed)


def test_without_a_server_the_next_start_is_chosen(
    sealed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "1", "--model-repository", str(sealed)]) == 0
    assert "from its next start on, release 1 is served" in capsys.readouterr().out
    assert json.loads((sealed / "served.json").read_text()) == {"releases": [1], "before": [1, 2]}
    assert main(["rollback", "--model-repository", str(sealed)]) == 0
    assert Served.load(sealed).releases == (1, 2)
    assert main(["list", "--model-repository", str(sealed)]) == 0
    shown = capsys.readouterr().out
    assert "yes, by default" in shown and "no server runs here" in shown
    (sealed / "text_encoder" / "1" / "model.onnx").write_bytes(b"")
    assert main(["load", "1", "--model-repository", str(sealed)]) == 2
    assert "text_encoder/1/model.onnx is empty" in capsys.readouterr().err
    assert main(["load", "9", "--model-repository", str(sealed)]) == 2
    assert "no release 9" in capsys.readouterr().err
    assert main(["list", "--model-repository", str(sealed), "--http-port", "1"]) == 2
    assert Served.load(sealed).releases == (1, 2)
    assert require_known(sealed, [2, 1, 2]) == [1, 2]


def test_tasks_name_the_releases_that_are_served_and_encoders_none(sealed: Path) -> None:
    encoders = {one.name: one.configured("onnxruntime", 1) for one in encoders_of(sealed, [1])}
    found = plan_models(sealed, [1], [], encoders)
    assert list(found) == [
        name for name in (*ENCODERS, *TASKS) if name not in ("patch_encoder", "retrieve")
    ]
    for name, model in found.items():
        config = parsed(model.config)
        assert list(config.version_policy.specific.versions) == [1]
        if name in TASKS:
            assert list(named_releases(config)) == [1]
            assert json.loads(config.parameters["release"].string_value)["version"] == 1
        else:
            assert not [key for key in config.parameters if key.startswith("release")]


def test_an_older_release_stays_for_its_index_and_a_newer_one_does_not(
    sealed: Path, tmp_path: Path
) -> None:
    digests = {one: encoders_of(sealed, [one])[0].facts.digest for one in (1, 2)}
    assert digests[1] != digests[2]
    indexes = tmp_path / "indexes"
    assert kept_for_indexes(sealed, [2], indexes) == {}
    write_facts(indexes / "fötos", digests[1])
    write_facts(indexes / "of another", "sha256:elsewhere")
    (indexes / "broken").mkdir()
    (indexes / "broken" / "index.json").write_text("{")
    assert kept_for_indexes(sealed, [2], indexes) == {1: ["fötos"]}
    assert kept_for_indexes(sealed, [1, 2], indexes) == {}
    write_facts(indexes / "new", digests[2])
    assert kept_for_indexes(sealed, [1], indexes) == {}
    flipped = (sealed / "text_encoder" / "1" / "model.onnx").read_bytes()
    (sealed / "text_encoder" / "1" / "model.onnx").write_bytes(flipped[:-1])
    assert kept_for_indexes(sealed, [2], indexes) == {}  # what is broken is not served


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "server" / MODELS).mkdir(parents=True)
    yield tmp_path / "server"


def test_the_folder_of_a_server_holds_what_is_offered_and_nothing_is_written_to_the_repository(
    sealed: Path, folder: Path
) -> None:
    before = sorted(str(path) for path in sealed.rglob("*"))
    for versions in ((1,), (1, 2), (2,)):
        for name in ("image_encoder", "classify"):
            put(folder, sealed, name, offer(*versions))
            there = folder / MODELS / name
            assert {path.name for path in there.iterdir()} == {"config.pbtxt", *map(str, versions)}
            for version in versions:
                names = {path.name for path in (sealed / name / str(version)).iterdir()}
                assert {path.name for path in (there / str(version)).iterdir()} - {
                    "__pycache__"
                } == names
    assert (
        folder / MODELS / "classify" / "2" / "__pycache__"
    ).is_file()  # where Python would write
    put(folder, sealed, "classify", None)
    assert not (folder / MODELS / "classify").exists()
    assert sorted(str(path) for path in sealed.rglob("*")) == before


class Keeps(StandIn):
    """Serves release 3, and keeps 1 for an index of it."""

    def __init__(self) -> None:
        super().__init__(models(1, 3))
        self.config = SimpleNamespace(model_repository=Path(), indexes=Path())
        self.changing = contextlib.nullcontext()
        self.serving = SimpleNamespace(offered=self.offered)
        self.record(Served((3,)), {1: ["photos"]})

    def plan_models(self, releases: Sequence[int], kept: Collection[int]) -> dict[str, ModelEntry]:
        return models(*sorted({*releases, *kept}))

    def record(self, served: Served, kept: dict[int, list[str]]) -> None:
        self.serving.served = served
        self.serving.kept = kept


def test_an_older_release_that_is_not_loaded_is_not_said_to_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An index of release 2 comes while 3 is served and 1 is kept; later the index of 1 goes."""
    needed = {1: ["photos", "more"], 2: ["new"]}
    monkeypatch.setattr("radapter_serve.server.releases.kept_for_indexes", lambda *_: dict(needed))
    server = Keeps()
    releases = Releases(server)  # type: ignore[arg-type]
    releases.remove_unneeded()
    assert releases.kept == {1: ["photos", "more"]}
    assert server.loaded["embed_text"] == {1, 3} and not server.steps
    del needed[1]
    releases.remove_unneeded()
    assert releases.kept == {}
    assert server.loaded["embed_text"] == {3}
