"""Putting releases in the place of others on a running server, so that no caller notices.

1. Encoders: the new versions are loaded beside the old ones, which the old tasks still call.
2. Tasks: each loads its new version, and goes over to it in one step when it is ready. From here on the new release
   answers new calls. The old one still answers the calls that it has begun.
3. Once the old tasks have gone, their encoders go.

Where anything fails in 1 or 2, all models go back to what they were.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import ENCODERS, MODELS
from radapter_serve.server.control import ServedVersion
from radapter_serve.server.models import ModelEntry, difference, parsed

LOAD_TIMEOUT_SECONDS = 300.0  # seconds that a model may take to load
DRAIN_TIMEOUT_SECONDS = (
    180.0  # seconds that tasks may take to answer what they have begun; longer than the longest request
)


class Control(Protocol):
    """What a switch asks of tritonserver."""

    def load(self, model: str, *, timeout: float) -> None:
        """Load a model as its folder is now."""

    def unload(self, model: str, *, timeout: float = 30.0) -> None:
        """Take a model away."""

    def index(self, *, ready: bool = False) -> list[ServedVersion]:
        """All versions that tritonserver knows."""


class Server(Protocol):
    """What a switch asks of a server."""

    offered: dict[str, ModelEntry]

    @property
    def control(self) -> Control:
        """Of its tritonserver."""

    def put(self, name: str, model: ModelEntry | None) -> None:
        """Change a model in the server's folder."""

    def refresh_shared_memory(self) -> None:
        """Models were loaded."""


def check_side_by_side(live: Mapping[str, ModelEntry], new: Mapping[str, ModelEntry]) -> None:
    """Check that the encoders of new releases can be loaded beside those that are served.

    Raises:
        RAdapterError: not so; names the encoder, and the way to serve the new releases all the same.
    """
    for name in ENCODERS:
        if name in live and name in new and (why := difference(parsed(live[name].config), parsed(new[name].config))):
            raise RAdapterError(
                f"{name} cannot be loaded beside the one that is served: {why}; stop the server, give this command "
                "again, and start the server"
            )


def switch(server: Server, new: Mapping[str, ModelEntry], say: Callable[[str], None]) -> None:
    """Let a server serve these models in the place of those of its releases.

    Args:
        server: that runs.
        new: the models of the releases to be served, and no others.
        say: called with a short line before each step.

    Raises:
        RAdapterError: a model does not load; then all are as they were.
    """
    before = dict(server.offered)
    gone = [name for name in _released(before) if name not in new]
    tasks = {name: model for name, model in new.items() if name not in ENCODERS}
    try:
        for name, model in new.items():
            if name in ENCODERS:
                say(f"loading {name}")
                # As it is served but for the versions: Triton goes on with those that it has.
                live = before.get(name, model)
                _load(server, name, live.at({*live.versions, *model.versions} if name in before else model.versions))
        # Before tasks start, because it removes the names of the memory of those that are starting.
        server.refresh_shared_memory()
        say(f"loading {', '.join(tasks)}")
        with ThreadPoolExecutor(len(tasks) or 1) as pool:
            list(pool.map(lambda item: _load(server, *item), tasks.items()))
        server.refresh_shared_memory()
    except (RAdapterError, OSError) as error:
        _roll_back(server, before)
        raise RAdapterError(str(error)) from error
    say("waiting for the calls that the old tasks have begun")
    _retire(server, new, gone)


def _retire(server: Server, new: Mapping[str, ModelEntry], gone: list[str]) -> None:
    """Take away what the new releases do not need; the folder comes first, so that a restart needs no more either."""
    for name in sorted(gone, key=lambda name: name in ENCODERS):  # encoders last
        if name not in ENCODERS:
            server.put(name, None)
            server.control.unload(name)
    _wait_for_tasks(server, [*new, *gone])
    for name in (name for name in (*new, *gone) if name in ENCODERS):
        live = server.offered[name]
        server.put(name, live.at(new[name].versions) if name in new else None)
        with contextlib.suppress(RAdapterError):  # it answers nobody any more, and a restart is without it
            if name in new:
                server.control.load(name, timeout=LOAD_TIMEOUT_SECONDS)
            else:
                server.control.unload(name)
    with contextlib.suppress(RAdapterError):
        server.refresh_shared_memory()


def _wait_for_tasks(server: Server, models: Collection[str]) -> None:
    tasks = {name for name in models if name not in ENCODERS}
    deadline = time.monotonic() + DRAIN_TIMEOUT_SECONDS
    with contextlib.suppress(RAdapterError):  # a server that died has no calls
        while time.monotonic() < deadline:
            if not any(one.state == "UNLOADING" and one.model in tasks for one in server.control.index()):
                return
            time.sleep(0.2)


def _load(server: Server, name: str, model: ModelEntry) -> None:
    server.put(name, model)
    try:
        server.control.load(name, timeout=LOAD_TIMEOUT_SECONDS)
    except RAdapterError as error:
        raise RAdapterError(f"{name} does not load: {error}") from error


def _roll_back(server: Server, before: Mapping[str, ModelEntry]) -> None:
    """Make the folder what it was, whatever became of tritonserver: a restart begins with it. Tasks go back first."""
    changed = [name for name, model in server.offered.items() if before.get(name) != model]
    for name in changed:
        with contextlib.suppress(OSError):
            server.put(name, before.get(name))
    tasks = [name for name in changed if name not in ENCODERS]
    for names in (tasks, [name for name in changed if name in ENCODERS]):
        for name in names:
            with contextlib.suppress(RAdapterError):
                if name in before:
                    server.control.load(name, timeout=LOAD_TIMEOUT_SECONDS)
                else:
                    server.control.unload(name)
        _wait_for_tasks(server, tasks)
    with contextlib.suppress(RAdapterError):
        server.refresh_shared_memory()


def _released(models: Mapping[str, ModelEntry]) -> list[str]:
    return [name for name in MODELS if name in models]
