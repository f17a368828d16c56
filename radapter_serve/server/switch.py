"""Putting releases in the place of others on a running server, so that no caller notices.

A switch is a plan, made first and then carried out:

1. Encoders: the new versions are loaded next to the old ones, which the old tasks still call.
2. Tasks: each loads its new version, and goes over to it in one step when it is ready. From here on
   the new release answers new calls. The old one still answers the calls that it has begun. 3. Once
   the old tasks have answered, their encoders are unloaded.

If anything fails in 1 or 2, the steps are undone, the last one first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import ENCODERS, MODELS
from radapter_serve.server.control import ServedVersion
from radapter_serve.server.models import ModelEntry, difference, parsed

LOAD_TIMEOUT_SECONDS = 300.0
DRAIN_TIMEOUT_SECONDS = (
    180.0  # for tasks to answer what they have begun; longer than the longest request
)
_POLL_SECONDS = 0.2


class Control(Protocol):
    """What a switch asks of tritonserver."""

    def load(self, model: str, *, timeout: float) -> None:
        """Load a model as its folder is now."""

    def unload(self, model: str, *, timeout: float = 30.0) -> None:
        """Unload a model."""

    def index(self, *, ready: bool = False) -> list[ServedVersion]:
        """All versions that tritonserver knows."""


class Server(Protocol):
    """What a switch asks of a server."""

    @property
    def control(self) -> Control:
        """Of its tritonserver."""

    def put(self, name: str, model: ModelEntry | None) -> None:
        """Change a model in the server's folder; several threads may call this at once."""

    def refresh_shared_memory(self) -> None:
        """Called after models were loaded."""


@dataclass(frozen=True)
class Change:
    """One model before and after a step.

    Attributes:
        model: its name.
        before: the model as it is served before; None if it is not.
        after: the model as it is served afterwards; None if it is not.
    """

    model: str
    before: ModelEntry | None
    after: ModelEntry | None

    def undo(self) -> Change:
        """The change back."""
        return Change(self.model, self.after, self.before)


@dataclass(frozen=True)
class Step:
    """Changes that are made at once.

    Attributes:
        title: what to tell a user before.
        changes: one for each model.
        drain: tasks that must have answered the calls of their old versions before.
    """

    title: str
    changes: tuple[Change, ...]
    drain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """The way of a server from some models to others.

    Attributes:
        switch: steps until the new releases answer; if one fails, it and those before it are
            undone.
        clean_up: steps that unload what is no longer needed; if one fails, more stays loaded than
            is needed.
    """

    switch: tuple[Step, ...]
    clean_up: tuple[Step, ...]

    def roll_back(self, begun: int) -> tuple[Step, ...]:
        """The steps that undo the first `begun` steps of `switch`, the last one first: tasks before
        their encoders.
        """
        undo = []
        drain: frozenset[str] = frozenset()
        for step in reversed(self.switch[:begun]):
            changes = tuple(
                change.undo() for change in step.changes if change.before != change.after
            )
            undo.append(Step(f"undoing: {step.title}", changes, drain))
            drain |= {change.model for change in changes if change.model not in ENCODERS}
        return tuple(undo)


def check_side_by_side(live: Mapping[str, ModelEntry], new: Mapping[str, ModelEntry]) -> None:
    """Check that the encoders of new releases can be loaded next to those that are served.

    Raises:
        RAdapterError: they cannot; names the encoder, and how to serve the new releases
            nevertheless.
    """
    for name in ENCODERS:
        if name not in live or name not in new:
            continue
        why = difference(parsed(live[name].config), parsed(new[name].config))
        if why:
            raise RAdapterError(
                f"{name} cannot be loaded next to the one that is served: {why}; stop the server,"
                " give this command again, and start the server"
            )


def plan_switch(live: Mapping[str, ModelEntry], new: Mapping[str, ModelEntry]) -> Plan:
    """Plan how a server comes to serve other releases.

    Args:
        live: all models that the server serves.
        new: the models of the releases to be served, and no others.
    """
    gone = [name for name in MODELS if name in live and name not in new]
    tasks = [name for name in new if name not in ENCODERS]
    gone_tasks = [name for name in gone if name not in ENCODERS]
    switch = []
    clean_up = []
    unload_encoders = [Change(name, live[name], None) for name in gone if name in ENCODERS]
    for name, model in new.items():
        if name not in ENCODERS:
            continue
        before = live.get(name)
        both = model
        if before is not None:
            # As it is served except for the versions: Triton keeps running those that it has.
            both = before.at({*before.versions, *model.versions})
        switch.append(Step(f"loading {name}", (Change(name, before, both),)))
        unload_encoders.append(Change(name, both, both.at(model.versions)))
    switch.append(
        Step(
            f"loading {', '.join(tasks)}",
            tuple(Change(name, live.get(name), new[name]) for name in tasks),
        )
    )
    if gone_tasks:
        changes = tuple(Change(name, live[name], None) for name in gone_tasks)
        clean_up.append(Step(f"unloading {', '.join(gone_tasks)}", changes))
    title = "waiting for the calls that the old tasks have begun"
    clean_up.append(Step(title, (), frozenset([*tasks, *gone_tasks])))
    # One after the other, as they were loaded.
    clean_up += [Step(f"unloading {change.model}", (change,)) for change in unload_encoders]
    return Plan(tuple(switch), tuple(clean_up))


def carry_out(
    plan: Plan, server: Server, say: Callable[[str], None], clock: Clock = SYSTEM
) -> None:
    """Carry out a plan on a server that runs.

    Args:
        plan: made for what the server serves now.
        server: to be changed.
        say: called with a short line before each step.
        clock: tells the time and waits.

    Raises:
        RAdapterError: a model does not load; then all models are as they were.
    """
    for number, step in enumerate(plan.switch, 1):
        say(step.title)
        try:
            _apply(server, step, clock)
        except (RAdapterError, OSError) as error:
            # A server that died is restarted from its folder, so every step is undone there,
            # whatever Triton answers.
            _apply_all(server, plan.roll_back(number), say, clock)
            raise RAdapterError(str(error)) from error
    _apply_all(server, plan.clean_up, say, clock)


def _apply_all(
    server: Server, steps: Collection[Step], say: Callable[[str], None], clock: Clock
) -> None:
    """Apply steps, each whether or not the one before failed."""
    for step in steps:
        say(step.title)
        with contextlib.suppress(RAdapterError, OSError):
            _apply(server, step, clock)
    with contextlib.suppress(RAdapterError):
        server.refresh_shared_memory()


def _apply(server: Server, step: Step, clock: Clock) -> None:
    if step.drain:
        _wait_for_calls(server, step.drain, clock)
    with ThreadPoolExecutor(len(step.changes) or 1) as pool:
        changing = [pool.submit(_change, server, change) for change in step.changes]
    for change in changing:  # all of them were tried, whatever the first one raises
        change.result()
    # After each step, because it removes the names of the memory of processes that are starting.
    server.refresh_shared_memory()


def _change(server: Server, change: Change) -> None:
    """Change the folder first, so that a restart needs no more either."""
    server.put(change.model, change.after)
    if change.after is None:
        server.control.unload(change.model)
        return
    try:
        server.control.load(change.model, timeout=LOAD_TIMEOUT_SECONDS)
    except RAdapterError as error:
        raise RAdapterError(f"{change.model} does not load: {error}") from error


def _wait_for_calls(server: Server, tasks: Collection[str], clock: Clock) -> None:
    """Wait until old versions of tasks have answered what they have begun."""
    deadline = clock.monotonic() + DRAIN_TIMEOUT_SECONDS
    with contextlib.suppress(RAdapterError):  # a server that died has no calls
        while clock.monotonic() < deadline:
            versions = server.control.index()
            if not any(one.state == "UNLOADING" and one.model in tasks for one in versions):
                return
            clock.sleep(_POLL_SECONDS)
