"""Client of Triton's model control API, and `switch`, which replaces the served releases with it.

The API can load code into the server, so it refuses requests without the server's secret.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import urllib3

from radapter_client.failures import read_failure
from radapter_serve.contract.errors import OVERLOADED
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.process import SYSTEM, Clock
from radapter_serve.release.config import parsed
from radapter_serve.release.repository import ENCODERS, MODELS
from radapter_serve.server.launch import SECRET_HEADER
from radapter_serve.server.models import ModelEntry
from radapter_serve.tasks.table import PROBES, Tensors

LOAD_TIMEOUT_SECONDS = 300.0
DRAIN_TIMEOUT_SECONDS = 180.0  # for tasks to answer their calls; longer than the longest request
_POLL_SECONDS = 0.2
# Statuses of a task that works: a refusal is an answer, too.
_WORKS = (200, 400, 429, 504)


class NoAnswer(RAdapterError):
    """The server did not answer, or not in time."""


@dataclass(frozen=True)
class Answer:
    """An HTTP status, and the body's JSON; None if the body is not JSON."""

    status: int
    body: Any

    @property
    def error(self) -> str:
        """Reason of a refusal, without the traceback of a model."""
        if isinstance(self.body, dict):
            return str(self.body.get("error", self.body)).partition("\n")[0]
        return f"status {self.status}"


class Control:
    """A client of a running tritonserver, at the URL of its HTTP endpoint, with its secret."""

    def __init__(self, url: str, secret: str) -> None:
        self.url = url
        self._headers = {SECRET_HEADER: secret, "Connection": "close"}

    def index(self, *, ready: bool = False) -> list[dict[str, Any]]:
        """All versions of models, or only the ready ones: name, version, state, reason."""
        versions: list[dict[str, Any]] = self._need("repository/index", {"ready": ready})
        return versions

    def serving(self) -> dict[str, list[int]]:
        """Ready versions of each model."""
        models: dict[str, list[int]] = {}
        for version in self.index(ready=True):
            models.setdefault(version["name"], []).append(int(version["version"]))
        return {name: sorted(versions) for name, versions in sorted(models.items())}

    def load(self, model: str, *, timeout: float = 120.0) -> None:
        """Load a model from its folder, and wait; its loaded versions are served meanwhile."""
        self._need(f"repository/models/{quote(model)}/load", {}, timeout=timeout)

    def unload(self, model: str) -> None:
        """Unload a model without waiting: it finishes its running requests, and takes no more."""
        self._need(f"repository/models/{quote(model)}/unload", {}, timeout=30.0)

    def is_ready(self) -> bool:
        """True if the server reports that all its models are ready."""
        try:
            return self.ask("health/ready", timeout=5.0).status == 200
        except NoAnswer:
            return False

    def version(self) -> str:
        """Version of Triton, such as 2.51.0."""
        return str(self.ask("").body["version"])

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = 10.0
    ) -> Answer:
        """POST JSON to a path below /v2, or GET it; raises `NoAnswer` after `timeout` seconds."""
        method = "GET" if body is None else "POST"
        url = f"{self.url}/v2/{path}".rstrip("/")
        try:
            # A new connection for each request: a model's process inherits the open ones when it
            # starts, and would keep them open, and silent, after the server has died.
            with urllib3.PoolManager(retries=False, headers=self._headers) as http:
                response = http.request(method, url, json=body, timeout=timeout)
        except urllib3.exceptions.HTTPError as error:
            raise NoAnswer(f"{self.url}: no answer ({reason(error)})") from error
        try:
            return Answer(response.status, response.json())
        except ValueError:
            return Answer(response.status, None)

    def _need(self, path: str, body: Mapping[str, Any], *, timeout: float = 10.0) -> Any:
        answer = self.ask(path, body, timeout=timeout)
        if answer.status != 200:
            raise RAdapterError(f"{self.url}: {answer.error}")
        return answer.body


def as_json_inputs(tensors: Tensors) -> list[dict[str, Any]]:
    """Inputs of a request, texts and encoded images, in the form of its JSON body."""
    inputs = []
    for name, array in tensors.items():
        values = [
            base64.b64encode(value).decode() if name == "image" else value.decode()
            for value in array.ravel()
        ]
        shape = list(array.shape)
        inputs.append({"name": name, "shape": shape, "datatype": "BYTES", "data": values})
    return inputs


def warm_up(control: Control, models: Mapping[str, Sequence[int]], timeout: float) -> None:
    """Probe each version of each task once, within `timeout` seconds each."""
    for model, versions in models.items():
        for version in versions if model in PROBES else ():
            path = f"models/{model}/versions/{version}/infer"
            try:
                answer = control.ask(
                    path, {"inputs": as_json_inputs(PROBES[model])}, timeout=timeout
                )
            except NoAnswer:
                raise RAdapterError(
                    f"{model} version {version} did not answer within {timeout:g} s; allow more"
                    " with --timeout"
                ) from None
            if answer.status not in _WORKS and read_failure(answer.error).code != OVERLOADED:
                raise RAdapterError(f"{model} version {version} fails: {answer.error}")


def check_side_by_side(old: Mapping[str, ModelEntry], new: Mapping[str, ModelEntry]) -> None:
    """Raise an error if an encoder of new releases cannot be loaded next to the served one."""
    for name in ENCODERS:
        if name not in old or name not in new:
            continue
        served = parsed(old[name].config)
        wanted = parsed(new[name].config)
        for field in ("backend", "default_model_filename", "max_batch_size", "input", "output"):
            before = getattr(served, field)
            after = getattr(wanted, field)
            if before == after:
                continue
            difference = f"its {field} is {before!r} and not {after!r}"
            if field in ("input", "output"):
                difference = f"its {field}s have other shapes or types"
            raise RAdapterError(
                f"{name} cannot be loaded next to the one that is served: {difference}; stop the"
                " server, give this command again, and start the server"
            )


class Server(Protocol):
    """The interface of a `TritonServer` that `switch` needs."""

    control: Control
    offered: dict[str, ModelEntry]

    def put(self, name: str, model: ModelEntry | None) -> None: ...

    def refresh(self) -> None: ...


def switch(
    server: Server,
    new: Mapping[str, ModelEntry],
    check: Callable[[], None],
    say: Callable[[str], None],
    clock: Clock = SYSTEM,
) -> None:
    """Replace the models of a server with those of other releases, without a gap for callers: the
    new encoders are loaded next to the old ones, then the tasks switch, and last the old encoders
    go. If loading fails, its steps are undone.
    """
    old = dict(server.offered)
    encoders = [name for name in new if name in ENCODERS]
    tasks = [name for name in new if name not in ENCODERS]
    gone = [name for name in MODELS if name in old and name not in new]
    gone_tasks = [name for name in gone if name not in ENCODERS]

    # Load the new encoders, one by one, and then all tasks. Of an encoder's config only the
    # versions change, so that Triton keeps running the loaded versions.
    steps: list[dict[str, ModelEntry]] = []
    for name in encoders:
        both = new[name]
        if name in old:
            both = old[name].at({*old[name].versions, *new[name].versions})
        steps.append({name: both})
    steps.append({name: new[name] for name in tasks})
    taken: list[dict[str, ModelEntry]] = []
    try:
        for models in steps:
            if models is steps[-1]:
                check()
            say(f"loading {', '.join(models)}")
            taken.append(models)
            _load(server, models)
        warm_up(server.control, {name: new[name].versions for name in tasks}, LOAD_TIMEOUT_SECONDS)
    except (RAdapterError, OSError) as error:
        # Undo the steps, in the server's folder, too, whatever Triton answers: a server that died
        # is restarted from its folder.
        for models in reversed(taken):
            say(f"undoing: loading {', '.join(models)}")
            if models is not steps[-1]:
                _drain(server, tasks, clock)
            before = {name: old.get(name) for name in models if old.get(name) != models[name]}
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
    """Load models at once; None unloads a model."""
    # Update the folder first, so that a restart loads the same models.
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
        for change in loading:  # all have been tried, even if the first one raises
            change.result()
    finally:
        # After each step: unlinks the shared memory of the new processes.
        server.refresh()


def _try_to_load(server: Server, models: Mapping[str, ModelEntry | None]) -> None:
    with contextlib.suppress(RAdapterError, OSError):
        _load(server, models)


def _drain(server: Server, tasks: Collection[str], clock: Clock) -> None:
    """Wait until the old versions of tasks have finished their calls."""
    deadline = clock.monotonic() + DRAIN_TIMEOUT_SECONDS
    with contextlib.suppress(RAdapterError):  # a server that died has no calls
        while clock.monotonic() < deadline:
            index = server.control.index()
            unloading = {entry["name"] for entry in index if entry.get("state") == "UNLOADING"}
            if unloading.isdisjoint(tasks):
                return
            clock.sleep(_POLL_SECONDS)
