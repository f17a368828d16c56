"""Puts releases in the place of others on a running server, so that no caller notices.

A switch is a plan, made first and then carried out:

1. Encoders: the new versions are loaded next to the old ones, which the old tasks still call.
2. Tasks: each loads its new version, and goes over to it in one step when it is ready. From here on
   the new release answers new calls; the old one answers the calls that it has begun.
3. Once the old tasks have answered, their encoders are unloaded.

If anything fails in 1 or 2, the steps are undone, the last one first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import ENCODERS, MODELS
from radapter_serve.server.models import ModelEntry, difference, parsed

LOAD_TIMEOUT_SECONDS = 300.0
DRAIN_TIMEOUT_SECONDS = 180.0  # for tasks to answer their calls; longer than the longest request
_POLL_SECONDS = 0.2


class Server(Protocol):
    """What a switch asks of a server."""

    control: Any  # of its tritonserver

    def put(self, name: str, model: ModelEntry | None) -> None:
        """Change a model in the server's folder."""

    def refresh(self) -> None:
        """Note what is loaded."""


@dataclass(frozen=True)
class Step:
    """Models that change at once, from a first to a second state; None is not loaded.

    Before that, the old versions of the tasks in `drain` must have answered their calls.
    """

    title: str
    changes: Mapping[str, tuple[ModelEntry | None, ModelEntry | None]]
    drain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """Steps until the new releases answer, and steps that unload what is no longer needed."""

    switch: tuple[Step, ...]
    clean_up: tuple[Step, ...]

    def roll_back(self, begun: int) -> list[Step]:
        """Steps that undo the first `begun` ones of `switch`: tasks before their encoders."""
        steps = []
        drain: frozenset[str] = frozenset()
        for step in reversed(self.switch[:begun]):
            changes = {
                name: (after, before)
                for name, (before, after) in step.changes.items()
                if before != after
            }
            steps.append(Step(f"undoing: {step.title}", changes, drain))
            drain |= changes.keys() - set(ENCODERS)
        return steps


def check_side_by_side(live: Mapping[str, ModelEntry], new: Mapping[str, ModelEntry]) -> None:
    """Raise an error if an encoder of new releases cannot be loaded next to the served one."""
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
    """Plan the way from all models that are served to those of other releases."""
    gone = [name for name in MODELS if name in live and name not in new]
    switch = []
    unload: list[tuple[str, ModelEntry, ModelEntry | None]] = [
        (name, live[name], None) for name in gone if name in ENCODERS
    ]
    for name in (name for name in new if name in ENCODERS):
        # Except for the versions as it is served: Triton keeps running those that it has.
        both = new[name]
        if name in live:
            both = live[name].at({*live[name].versions, *new[name].versions})
        switch.append(Step(f"loading {name}", {name: (live.get(name), both)}))
        unload.append((name, both, both.at(new[name].versions)))

    tasks = [name for name in new if name not in ENCODERS]
    switch.append(
        Step(f"loading {', '.join(tasks)}", {name: (live.get(name), new[name]) for name in tasks})
    )
    clean_up = []
    gone_tasks = [name for name in gone if name not in ENCODERS]
    if gone_tasks:
        changes = {name: (live[name], None) for name in gone_tasks}
        clean_up.append(Step(f"unloading {', '.join(gone_tasks)}", changes))
    title = "waiting for the calls that the old tasks have begun"
    clean_up.append(Step(title, {}, frozenset([*tasks, *gone_tasks])))
    clean_up += [Step(f"unloading {name}", {name: (old, left)}) for name, old, left in unload]
    return Plan(tuple(switch), tuple(clean_up))


def carry_out(
    plan: Plan, server: Server, say: Callable[[str], None], clock: Clock = SYSTEM
) -> None:
    """Carry out a plan for what a running server serves now; `say` takes a line before each step.

    Raises `RAdapterError` if a model does not load; then all models are as they were.
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
        server.refresh()


def _apply(server: Server, step: Step, clock: Clock) -> None:
    # Wait for the calls of old versions; a server that died has none.
    deadline = clock.monotonic() + DRAIN_TIMEOUT_SECONDS
    with contextlib.suppress(RAdapterError):
        while step.drain and clock.monotonic() < deadline:
            versions = server.control.index()
            unloading = {one["name"] for one in versions if one.get("state") == "UNLOADING"}
            if not unloading & step.drain:
                break
            clock.sleep(_POLL_SECONDS)

    # The folder first, so that a restart needs no more.
    for name, (_, model) in step.changes.items():
        server.put(name, model)

    def load(name: str) -> None:
        if step.changes[name][1] is None:
            server.control.unload(name)
            return
        try:
            server.control.load(name, timeout=LOAD_TIMEOUT_SECONDS)
        except RAdapterError as error:
            raise RAdapterError(f"{name} does not load: {error}") from error

    with ThreadPoolExecutor(len(step.changes) or 1) as pool:
        loading = [pool.submit(load, name) for name in step.changes]
    for change in loading:  # all were tried, whatever the first one raises
        change.result()
    # After each step: this removes the names of the memory of processes that are starting.
    server.refresh()
