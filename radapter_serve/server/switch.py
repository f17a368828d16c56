"""Puts releases in the place of others on a running server, so that no caller notices.

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
from typing import Protocol

from radapter_serve.errors import RAdapterError
from radapter_serve.process import SYSTEM, Clock
from radapter_serve.release.repository import ENCODERS, MODELS
from radapter_serve.server.control import Control
from radapter_serve.server.models import ModelEntry, parsed

LOAD_TIMEOUT_SECONDS = 300.0
DRAIN_TIMEOUT_SECONDS = 180.0  # for tasks to answer their calls; longer than the longest request
_POLL_SECONDS = 0.2


class Server(Protocol):
    """The part of a `TritonServer` that a switch needs."""

    control: Control
    offered: dict[str, ModelEntry]

    def put(self, name: str, model: ModelEntry | None) -> None: ...

    def refresh(self) -> None: ...


def check_side_by_side(old: Mapping[str, ModelEntry], new: Mapping[str, ModelEntry]) -> None:
    """Raise an error if an encoder of new releases cannot be loaded next to the served one."""
    for name in ENCODERS:
        if name not in old or name not in new:
            continue
        served = parsed(old[name].config)
        wanted = parsed(new[name].config)
        differences = [
            f"its {field} is {getattr(served, field)!r} and not {getattr(wanted, field)!r}"
            for field in ("backend", "default_model_filename", "max_batch_size")
            if getattr(served, field) != getattr(wanted, field)
        ]
        differences += [
            f"its {kind}s have other shapes or types"
            for kind in ("input", "output")
            if list(getattr(served, kind)) != list(getattr(wanted, kind))
        ]
        if differences:
            raise RAdapterError(
                f"{name} cannot be loaded next to the one that is served: {differences[0]}; stop"
                " the server, give this command again, and start the server"
            )


def switch(
    server: Server,
    new: Mapping[str, ModelEntry],
    say: Callable[[str], None],
    clock: Clock = SYSTEM,
) -> None:
    """Serve the models of other releases in the place of those that a server offers; `say` takes a
    line before each step.

    Raises `RAdapterError` if a model does not load; then all models are as they were.
    """
    old = dict(server.offered)
    encoders = [name for name in new if name in ENCODERS]
    tasks = [name for name in new if name not in ENCODERS]
    gone = [name for name in MODELS if name in old and name not in new]
    gone_tasks = [name for name in gone if name not in ENCODERS]

    # Load the new encoders, one by one, and then all tasks. Except for its versions, an encoder
    # keeps the config that it is served by: Triton goes on to run the versions that it has.
    steps: list[dict[str, ModelEntry]] = []
    for name in encoders:
        both = new[name]
        if name in old:
            both = old[name].at({*old[name].versions, *new[name].versions})
        steps.append({name: both})
    steps.append({name: new[name] for name in tasks})
    for number, models in enumerate(steps, 1):
        say(f"loading {', '.join(models)}")
        try:
            _load(server, models)
        except (RAdapterError, OSError) as error:
            # Undo the steps. A server that died is restarted from its folder, so each of them is
            # undone there, whatever Triton answers.
            for step in reversed(steps[:number]):
                say(f"undoing: loading {', '.join(step)}")
                if step is not steps[-1]:
                    _drain(server, tasks, clock)
                before = {name: old.get(name) for name in step if old.get(name) != step[name]}
                _try_to_load(server, before)
            raise RAdapterError(str(error)) from error

    # Unload what is no longer needed.
    if gone_tasks:
        say(f"unloading {', '.join(gone_tasks)}")
        _try_to_load(server, dict.fromkeys(gone_tasks))
    say("waiting for the calls that the old tasks have begun")
    _drain(server, [*tasks, *gone_tasks], clock)
    left: dict[str, ModelEntry | None] = {name: None for name in gone if name in ENCODERS}
    left |= {name: server.offered[name].at(new[name].versions) for name in encoders}
    for name, model in left.items():
        say(f"unloading {name}")
        _try_to_load(server, {name: model})


def _load(server: Server, models: Mapping[str, ModelEntry | None]) -> None:
    """Load models at once; None unloads one."""
    # The folder first, so that a restart needs no more.
    for name, model in models.items():
        server.put(name, model)

    def load(name: str) -> None:
        if models[name] is None:
            server.control.unload(name)
            return
        try:
            server.control.load(name, timeout=LOAD_TIMEOUT_SECONDS)
        except RAdapterError as error:
            raise RAdapterError(f"{name} does not load: {error}") from error

    with ThreadPoolExecutor(len(models) or 1) as pool:
        loading = [pool.submit(load, name) for name in models]
    try:
        for change in loading:  # all were tried, whatever the first one raises
            change.result()
    finally:
        # After each step: this removes the names of the memory of processes that are starting.
        server.refresh()


def _try_to_load(server: Server, models: Mapping[str, ModelEntry | None]) -> None:
    with contextlib.suppress(RAdapterError, OSError):
        _load(server, models)


def _drain(server: Server, tasks: Collection[str], clock: Clock) -> None:
    """Wait until the old versions of tasks have answered their calls."""
    deadline = clock.monotonic() + DRAIN_TIMEOUT_SECONDS
    with contextlib.suppress(RAdapterError):  # a server that died has no calls
        while clock.monotonic() < deadline:
            versions = server.control.index()
            unloading = {one["name"] for one in versions if one.get("state") == "UNLOADING"}
            if unloading.isdisjoint(tasks):
                return
            clock.sleep(_POLL_SECONDS)
