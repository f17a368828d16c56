"""Starting and stopping tritonserver."""

from __future__ import annotations

import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.environment import otlp_endpoint
from radapter_serve.errors import RAdapterError
from radapter_serve.lock import hold
from radapter_serve.release.config import check
from radapter_serve.release.served import Served
from radapter_serve.server.backlog import Backlog
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.control import Control
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.installation import Installation, find_tritonserver
from radapter_serve.server.instances import SharedMemory, check_shared_memory, with_instances
from radapter_serve.server.launch import WAITING, command_line, lay_out, put, server_environment
from radapter_serve.server.messages import Messages
from radapter_serve.server.models import (
    ModelEntry,
    kept_for_indexes,
    models_of,
    other_models,
    plan_models,
    processes_of,
)
from radapter_serve.server.probe import warm_up
from radapter_serve.server.processes import (
    FOLDER_PREFIX,
    disk_errors,
    hide_argument,
    hide_shared_memory,
    how_it_ended,
    remove,
    remove_leftovers,
)
from radapter_serve.server.runtime_choice import Measured, configure
from radapter_serve.server.server_process import Launch, ServerProcess, StartProcess, TritonProcess
from radapter_serve.server.watch import SERVER, Failure, Watch
from radapter_serve.signals import STOPPING, handled

_READY_POLL_SECONDS = 0.05


def _ignore(line: str) -> None:
    """Takes the place of a progress display."""


@dataclass(frozen=True)
class Serving:
    """What a server serves now; replaced as a whole.

    Attributes:
        served: the releases that are served, and those before them.
        kept: older releases that embed queries to the indexes that they made, with the names of the
            indexes.
        offered: the models in the server's folder, with their configs.
        models: the models that are loaded, and their versions.
    """

    served: Served = field(default_factory=lambda: Served(()))
    kept: Mapping[int, list[str]] = field(default_factory=dict)
    offered: Mapping[str, ModelEntry] = field(default_factory=dict)
    models: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Checks:
    """What a server has found out about its releases and this machine.

    Attributes:
        runtime: runs all encoders; None if each has the runtime of its export.
        measured: what `runtime="auto"` measured.
        version_compatible: whether an engine brings a TensorRT runtime of its own.
        warning: what a user should know about this machine; None if nothing.
    """

    runtime: str | None = None
    measured: Sequence[Measured] = ()
    version_compatible: bool = False
    warning: str | None = None


@dataclass(frozen=True)
class _Folder:
    """A server's folder, which only its owner can read, locked while the server lives.

    Attributes:
        path: of it.
        let_go: ends the lock.
    """

    path: Path
    let_go: Callable[[], None]


@dataclass(frozen=True)
class _Running:
    """A process, and what looks after it."""

    process: ServerProcess
    watch: Watch
    backlog: Backlog | None = None


class TritonServer:
    """A running tritonserver, as a context manager.

    The server ends with the thread that started it, so that none survives a killed program.

    No caller can load a model into it: that would let him run his own code. `Releases` puts other
    releases in the place of those that it serves, and `Supervisor` keeps it up.

    Args:
        config: its settings.
        installation: the tritonserver to start; the one of this machine if None.
        start_process: starts the process.
        clock: tells the time and waits.

    Attributes:
        config: as given.
        control: asks Triton itself, while it runs.
        serving: what it serves now.
        checks: what it has found out about its releases and this machine.
        changing: held while the server's folder or its processes change.

    Raises:
        RAdapterError: at `start` (or on entering): no server, no release, a port in use, a runtime
            that is not right here, or a model that does not load or does not answer.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        installation: Installation | None = None,
        start_process: StartProcess = TritonProcess,
        clock: Clock = SYSTEM,
    ) -> None:
        self.config = config
        self.serving = Serving()
        self.checks = Checks(config.runtime)
        self.changing = threading.RLock()
        self._secret = secrets.token_hex(32)
        self.control = Control(config.endpoints.http_url, self._secret)
        self._installation = installation
        self._start_process = start_process
        self._clock = clock
        self._updating = threading.Lock()
        self._folder: _Folder | None = None
        self._running: _Running | None = None

    @property
    def endpoints(self) -> Endpoints:
        """Where it listens."""
        return self.config.endpoints

    @property
    def http_url(self) -> str:
        """For example `http://127.0.0.1:8000`."""
        return self.endpoints.http_url

    @property
    def grpc_url(self) -> str:
        """For example `grpc://127.0.0.1:8001`."""
        return self.endpoints.grpc_url

    @property
    def metrics_url(self) -> str:
        """For example `http://127.0.0.1:8002/metrics`."""
        return self.endpoints.metrics_url

    @property
    def models(self) -> Mapping[str, list[int]]:
        """The models that are loaded, and their versions."""
        return self.serving.models

    @property
    def pid(self) -> int | None:
        """The number of its process; None if it does not run."""
        return None if self._running is None else self._running.process.pid

    @property
    def folder(self) -> Path:
        """The server's folder, which only its owner can read.

        Raises:
            RAdapterError: the server does not run.
        """
        if self._folder is None:
            raise RAdapterError("the server does not run; start it with: radapter-serve")
        return self._folder.path

    def start(self, progress: Callable[[str], None] = _ignore) -> TritonServer:
        """Start the server and wait until all its tasks have answered once.

        Args:
            progress: called with a short line before each step that takes long.
        """
        repository = self.config.model_repository
        models_of(repository)
        self.endpoints.check_ports()
        served = self.config.wanted()
        check(repository, served.releases, progress)
        if self._installation is None:
            self._installation = find_tritonserver()
        remove_leftovers()
        kept = kept_for_indexes(repository, served.releases, self.config.indexes)
        encoders = self._configure(served.releases, progress)
        released = plan_models(repository, served.releases, sorted(kept), encoders)
        offered = with_instances(
            {**other_models(repository, encoders), **released}, self.config.instance_counts
        )
        warning = check_shared_memory(
            offered, self._installation.in_python, SharedMemory.of_this_machine()
        )
        self.serving = Serving(served, kept, offered)
        self.checks = replace(self.checks, warning=warning)
        progress(f"starting tritonserver for {repository}")
        try:
            self._make_folder(self._installation)
            self._run("wb")
        except BaseException:
            self.stop()
            raise
        return self

    def plan_models(
        self,
        releases: Sequence[int],
        kept: Collection[int],
        progress: Callable[[str], None] = _ignore,
    ) -> dict[str, ModelEntry]:
        """The models of releases, as this server is to load them on this machine.

        Raises:
            RAdapterError: a release whose runtime does not compute here what torch computed.
        """
        encoders = self._configure(releases, progress)
        models = plan_models(self.config.model_repository, releases, sorted(kept), encoders)
        return with_instances(models, self.config.instance_counts)

    def put(self, name: str, model: ModelEntry | None) -> None:
        """Change a model in the server's folder, to be loaded from there; None removes it."""
        put(self.folder, self.config.model_repository, name, model)
        with self._updating:
            offered = {
                other: entry for other, entry in self.serving.offered.items() if other != name
            }
            if model is not None:
                offered[name] = model
            self.serving = replace(self.serving, offered=offered)

    def record(self, served: Served, kept: Mapping[int, list[str]]) -> None:
        """Note which releases are served, and which are kept for indexes, after a switch."""
        with self._updating:
            self.serving = replace(self.serving, served=served, kept=kept)

    def refresh_shared_memory(self) -> None:
        """Hide the memory of processes, and ask what is loaded; to be called after models were
        loaded.
        """
        hide_shared_memory(self.folder)
        if self._running is not None:
            # so that a process that dies before the next poll is known by then
            self._running.watch.models()
        models = self.control.serving()
        with self._updating:
            self.serving = replace(self.serving, models=models)

    def restart(self) -> None:
        """Start tritonserver again, with the same models and settings, in whatever state it is.

        Raises:
            RAdapterError: it does not start.
        """
        with self.changing:
            self._end_process(grace_seconds=0)
            self._run("ab")

    def reload(self, model: str) -> None:
        """Start the processes of a model again; the calls that they had begun fail, and the other
        models go on.

        Raises:
            RAdapterError: it does not load.
        """
        with self.changing:
            self.control.unload(model)
            self.control.load(model, timeout=self.config.timeout)
            self.refresh_shared_memory()

    def failures(self) -> list[Failure]:
        """What has died since the last call; to be called now and then, because Triton does not
        look by itself.
        """
        if self._running is None:
            return [Failure(SERVER, "it was not started, or it was stopped")]
        failures = self._running.watch.poll()
        code = self._running.process.poll()
        if code is not None and code >= 0:  # it was not ended by a signal, so its log says why
            return [
                Failure(SERVER, f"{failure.why}: {self._messages.reason()}") for failure in failures
            ]
        return failures

    def check(self) -> None:
        """Check that the server works, for programs that do not leave that to a `Supervisor`.

        Raises:
            RAdapterError: the server, or the process of one of its models, is gone.
        """
        for failure in self.failures():
            raise RAdapterError(f"{failure}; start the server again: radapter-serve")

    def ticks(self, models: Collection[str]) -> int:
        """The processor time that the processes of models have used, in hundredths of a second."""
        return 0 if self._running is None else self._running.watch.ticks(models)

    def pids(self, model: str) -> list[int]:
        """The numbers of a model's processes."""
        if self._running is None:
            return []
        return [pid for pid, name in self._running.watch.models().items() if name == model]

    def kill(self, name: str) -> None:
        """End the processes of a model, or tritonserver itself, at once."""
        if self._running is not None:
            self._running.watch.kill(name)

    def stop(self) -> None:
        """Stop the server and all its processes; nothing of it stays, in /dev/shm, /tmp or the
        model repository.
        """
        # What stops already must not be cut short by a second Ctrl-C.
        with handled(signal.SIG_IGN, signal.SIGINT, *STOPPING):
            self._end_process(grace_seconds=self.config.drain_seconds + 5)
            if self._folder is not None:
                remove(self._folder.path)
                self._folder.let_go()
                self._folder = None

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _configure(
        self, releases: Sequence[int], progress: Callable[[str], None]
    ) -> dict[str, str]:
        """The config of each encoder for this machine."""
        assert self._installation is not None
        configured = configure(
            self.config.model_repository,
            releases,
            self.checks.runtime,
            self.config.encoder_threads,
            self._installation,
            progress,
        )
        known = self.checks.version_compatible
        if configured.version_compatible and not known and self._running is not None:
            raise RAdapterError(
                "an engine brings a TensorRT runtime of its own, which a server allows from its"
                " start on; stop the server, give this command again, and start the server"
            )
        self.checks = replace(
            self.checks,
            runtime=configured.runtime,
            measured=configured.measured or self.checks.measured,
            version_compatible=known or configured.version_compatible,
        )
        return configured.configs

    @property
    def _messages(self) -> Messages:
        log = self.config.log or self.folder / "server.log"
        where = str(self.config.log or "radapter-serve --verbose")
        return Messages(None if self.config.verbose else log, where)

    def _make_folder(self, installation: Installation) -> None:
        with disk_errors():
            path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
            self._folder = _Folder(path, hold(path))
            lay_out(path, installation, self.config.model_repository, self.serving.offered)

    def _launch(self) -> Launch:
        """What tritonserver is started with now."""
        assert self._installation is not None
        command = command_line(
            self.folder,
            self._installation,
            self.endpoints.flags(),
            self._secret,
            exit_timeout=self.config.drain_seconds,
            version_compatible=self.checks.version_compatible,
            traced=otlp_endpoint() is not None,
        )
        models = (f"--load-model={model}" for model in self.serving.offered)
        environment = server_environment(
            self._installation, self.folder, self.config.indexes, self.config.encoder_threads
        )
        return Launch((*command, *models), environment, self.folder)

    def _run(self, mode: Literal["wb", "ab"]) -> None:
        """Start the process, and wait until all tasks have answered; `mode` begins its log or adds
        to it.
        """
        with self._messages.open(mode) as output:
            process = self._start_process(self._launch(), output)
        running = _Running(process, Watch(process))
        self._running = running
        deadline = self._clock.monotonic() + self.config.timeout
        self._wait_until_ready(process, deadline)
        hide_argument(process.pid, self._secret)
        self.refresh_shared_memory()
        warm_up(self.control, self.models, max(1.0, deadline - self._clock.monotonic()))
        backlog = Backlog(
            self.metrics_url,
            self.folder / WAITING,
            self._processes_of_models,
            max_waiting=self.config.max_waiting,
        )
        self._running = replace(running, backlog=backlog.start())
        self.check()

    def _wait_until_ready(self, process: ServerProcess, deadline: float) -> None:
        while not self.control.is_ready():
            code = process.poll()
            if code is not None:
                raise RAdapterError(
                    f"tritonserver did not start: {how_it_ended(code)}: {self._messages.reason()}"
                )
            if self._clock.monotonic() > deadline:
                why = f"was not ready after {self.config.timeout:g} s: {self._messages.reason()}"
                raise RAdapterError(f"tritonserver {why}; allow more with --timeout")
            self._clock.sleep(_READY_POLL_SECONDS)

    def _processes_of_models(self) -> dict[str, int]:
        return {name: processes_of(model) for name, model in self.serving.offered.items()}

    def _end_process(self, *, grace_seconds: float) -> None:
        if self._running is not None:
            self._running.process.stop(grace_seconds)
            if self._running.backlog is not None:
                self._running.backlog.stop()
            self._running = None
        if self._folder is not None:
            hide_shared_memory(self._folder.path)
