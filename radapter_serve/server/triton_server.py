"""Starting and stopping tritonserver."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import check
from radapter_serve.release.repository import AUTO, RUNTIMES
from radapter_serve.release.served import Served
from radapter_serve.server.backlog import MAX_WAITING, Backlog
from radapter_serve.server.control import Control
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.installation import Installation, find_tritonserver
from radapter_serve.server.instances import check_shared_memory, counts, with_instances
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
    hide_argument,
    hide_shared_memory,
    how_it_ended,
    remove,
    remove_leftovers,
)
from radapter_serve.server.runtime_choice import Measured, configure
from radapter_serve.server.watch import SERVER, Failure, Watch
from radapter_serve.signals import handled
from radapter_serve.threads import total


def free_ports() -> tuple[int, int, int]:
    """Three ports that nobody listens on, for a server that only this machine uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        first, second, third = (one.getsockname()[1] for one in sockets)
    return first, second, third


class TritonServer(Endpoints):
    """A running tritonserver, as a context manager.

    The server ends with the thread that started it, so that a killed program leaves none behind.

    No caller can load a model into it: that would let him run his own code. `Releases` puts other releases in the place
    of those that it serves, and `Supervisor` keeps it up.

    Args:
        model_repository: folder that radapter-export has filled.
        host: address or name to listen on; loopback by default, for the server knows no authentication.
        http_port: port of the HTTP endpoint.
        grpc_port: port of the gRPC endpoint.
        metrics_port: port of the Prometheus metrics.
        releases: those to serve; as `served.json` says, else those of the newest export, if None.
        indexes: folder of the indexes for `retrieve`; need not be there yet.
        runtime: that runs the encoders, once it is checked to compute what torch computed: onnxruntime, openvino or
            tensorrt; auto measures and takes the fastest. As exported if None.
        threads: that compute in an encoder, shared by its instances; one a core if None.
        instances: processes of the tasks, each a number for all or TASK=NUMBER; where a task is not named, as its
            config says, which is one. With two, a slow request does not hold up all others of its task.
        max_waiting: requests that may wait for a model; the longest waiting of more are refused.
        timeout: seconds to wait until every model answers.
        drain_seconds: that calls under way may take when the server is stopped.
        trust_network: whether everybody who can reach a host beyond loopback may use the server.
        log: file for the server's messages; None keeps them for the report of a failure only.
        verbose: let the server write its messages to this process's stderr instead.

    Attributes:
        control: asks Triton itself, while it runs.
        models: what is loaded, and its versions.
        offered: the same as the server's folder has it, with the configs.
        served: the releases that are served, and those before them.
        kept: older releases that embed queries to the indexes that they made, with the names of the indexes.
        changing: held while the server's folder or its processes change.
        measured: what `runtime="auto"` found.
        warning: what a user should know of this machine, or None.

    Raises:
        RAdapterError: an unknown host or runtime, a time-out or threads that are none, or a network that is not
            trusted; at `start` (or on entering): no server, no release, a port in use, a runtime that is not right
            here, or a model that does not load or does not answer.
    """

    def __init__(
        self,
        model_repository: str | Path,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        *,
        releases: Sequence[int] | None = None,
        indexes: str | Path = "indexes",
        runtime: str | None = None,
        threads: int | None = None,
        instances: Sequence[str] = (),
        max_waiting: int = MAX_WAITING,
        timeout: float = 120.0,
        drain_seconds: int = 10,
        trust_network: bool = False,
        log: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(host, http_port, grpc_port, metrics_port, trust_network=trust_network)
        self.model_repository = Path(model_repository).resolve()
        self.indexes = Path(indexes).resolve()
        if not timeout > 0:
            raise RAdapterError(f"--timeout is {timeout:g}; allowed are seconds above 0")
        if drain_seconds < 1:
            raise RAdapterError(f"--drain-seconds is {drain_seconds}; allowed are whole seconds from 1")
        if runtime not in (None, AUTO, *RUNTIMES):
            raise RAdapterError(f"--runtime is {runtime}; allowed are {', '.join((*RUNTIMES, AUTO))}")
        if threads is not None and threads < 1:
            raise RAdapterError(f"--threads is {threads}; allowed are 1 and more")
        if max_waiting < 1:
            raise RAdapterError(f"--max-waiting is {max_waiting}; allowed are 1 and more")
        self._max_waiting = max_waiting
        self._timeout, self._drain_seconds = timeout, drain_seconds
        self._log, self._verbose = Path(log) if log else None, verbose
        self._messages = Messages(None, "")
        self.runtime, self.threads = runtime, threads or total()
        self._releases = releases
        self._instances = counts(instances)
        self._version_compatible = False
        self._secret = secrets.token_hex(32)
        self.control = Control(self.http_url, self._secret)
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: Watch | None = None
        self._backlog: Backlog | None = None
        self._folder: Path | None = None
        self._lock: int | None = None
        self._command: list[str] = []
        self._environment: dict[str, str] = {}
        self.measured: list[Measured] = []
        self.models: dict[str, list[int]] = {}
        self.offered: dict[str, ModelEntry] = {}
        self.served = Served(())
        self.kept: dict[int, list[str]] = {}
        self.changing = threading.RLock()
        self.warning: str | None = None

    def start(self, progress: Callable[[str], None] = lambda line: None) -> TritonServer:
        """Start the server and wait until all its tasks have answered once.

        Args:
            progress: called with a short line before each step that takes long.
        """
        models_of(self.model_repository)
        self.check_ports()
        self.served = Served.load(self.model_repository)
        if self._releases is not None:
            self.served = Served(tuple(sorted(self._releases)))
        check(self.model_repository, self.served.releases, progress)
        self._installation = find_tritonserver()
        remove_leftovers()
        self.kept = kept_for_indexes(self.model_repository, self.served.releases, self.indexes)
        encoders = self._configure(self.served.releases, progress)
        released = plan_models(self.model_repository, self.served.releases, sorted(self.kept), encoders)
        self.offered = with_instances({**other_models(self.model_repository, encoders), **released}, self._instances)
        self.warning = check_shared_memory(self.offered, self._installation.in_python)
        progress(f"starting tritonserver for {self.model_repository}")
        try:
            self._lay_out(self._installation)
            self._run("wb")
        except BaseException:
            self.stop()
            raise
        return self

    def plan_models(
        self, releases: Sequence[int], kept: Collection[int], progress: Callable[[str], None] = lambda line: None
    ) -> dict[str, ModelEntry]:
        """The models of releases, as this server is to load them on this machine.

        Raises:
            RAdapterError: a release whose runtime is not right here.
        """
        encoders = self._configure(releases, progress)
        return with_instances(plan_models(self.model_repository, releases, sorted(kept), encoders), self._instances)

    def _configure(self, releases: Sequence[int], progress: Callable[[str], None]) -> dict[str, str]:
        """The config of each encoder for this machine."""
        configured = configure(
            self.model_repository, releases, self.runtime, self.threads, self._installation, progress
        )
        self.runtime = configured.runtime
        self.measured = configured.measured or self.measured
        if configured.version_compatible and self._process is not None and not self._version_compatible:
            raise RAdapterError(
                "an engine brings a TensorRT runtime of its own, which a server allows from its start on; stop the "
                "server, give this command again, and start the server"
            )
        self._version_compatible |= configured.version_compatible
        return configured.configs

    @property
    def folder(self) -> Path:
        """Of the server, which its owner alone can read.

        Raises:
            RAdapterError: it does not run.
        """
        if self._folder is None:
            raise RAdapterError("the server does not run; start it with: radapter-serve")
        return self._folder

    def put(self, name: str, model: ModelEntry | None) -> None:
        """Change a model in the server's folder, to be loaded from there; None takes it away."""
        put(self.folder, self.model_repository, name, model)
        if model is None:
            self.offered.pop(name, None)
        else:
            self.offered[name] = model

    def refresh_shared_memory(self) -> None:
        """To be called after models were loaded: hides the memory of their processes, and looks what is served."""
        hide_shared_memory(self.folder)
        if self._watch is not None:
            self._watch.models()  # a process that dies before the next look is known by then
        self.models = self.control.serving()

    def restart(self) -> None:
        """Start tritonserver again, with the same models and settings, whatever has become of it.

        Raises:
            RAdapterError: it does not start.
        """
        with self.changing:
            self._kill()
            self._run("ab")

    def reload(self, model: str) -> None:
        """Start the processes of a model again; what they had begun fails, and the other models go on.

        Raises:
            RAdapterError: it does not load.
        """
        with self.changing:
            self.control.unload(model)
            self.control.load(model, timeout=self._timeout)
            self.refresh_shared_memory()

    def failures(self) -> list[Failure]:
        """What has died since this was last asked; to be asked now and then, for Triton does not look by itself."""
        if self._watch is None:
            return [Failure(SERVER, "it was not started, or it was stopped")]
        failures = self._watch.poll()
        if self._process is not None and (self._process.poll() or -1) >= 0:  # no signal: its log says why
            return [Failure(SERVER, f"{failure.why}: {self._messages.reason()}") for failure in failures]
        return failures

    def check(self) -> None:
        """Look after the server, for who does not leave that to a `Supervisor`.

        Raises:
            RAdapterError: the server, or the process of one of its models, is gone.
        """
        for failure in self.failures():
            raise RAdapterError(f"{failure}; start the server again: radapter-serve")

    def ticks(self, models: Collection[str]) -> int:
        """The processor's time that the processes of models have used, in hundredths of a second."""
        return self._watch.ticks(models) if self._watch is not None else 0

    def kill(self, name: str) -> None:
        """End the processes of a model, or tritonserver itself, at once."""
        if self._watch is not None:
            self._watch.kill(name)

    def stop(self) -> None:
        """Stop the server and all its processes; nothing of it stays, in /dev/shm, /tmp or the model repository."""
        # What stops already must not be cut short by a second Ctrl-C.
        with handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process = self._process
            if process is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self._drain_seconds + 5)
            self._kill()
            if self._folder is not None:
                remove(self._folder)
            if self._lock is not None:
                os.close(self._lock)
            self._folder = self._lock = None

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _lay_out(self, installation: Installation) -> None:
        """Make the server's folder, and what tritonserver is started with."""
        try:
            folder = self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
            log, where = self._log or folder / "server.log", str(self._log or "radapter-serve --verbose")
            self._messages = Messages(None if self._verbose else log, where)
            self._lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            lay_out(folder, installation, self.model_repository, self.offered)
        except OSError as error:
            why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
            raise RAdapterError(
                f"cannot write into {tempfile.gettempdir()}: {why}; free some space, or set TMPDIR to another"
            ) from None
        self._command = command_line(
            folder,
            installation,
            self.flags(),
            self._secret,
            exit_timeout=self._drain_seconds,
            version_compatible=self._version_compatible,
        )
        self._environment = server_environment(installation, folder, self.indexes, self.threads)

    def _run(self, mode: Literal["wb", "ab"]) -> None:
        """Start the process, and wait until all tasks have answered; `mode` begins its log or adds to it."""
        assert self._folder is not None
        with self._messages.open(mode) as output:
            self._process = subprocess.Popen(
                [*self._command, *(f"--load-model={model}" for model in self.offered)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                cwd=self._folder,  # a model's process imports from the current folder first
                umask=0o077,  # nobody else reads its memory in /dev/shm
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops the server in order
            )
        self._watch = Watch(self._process)
        deadline = time.monotonic() + self._timeout
        while not self.control.is_ready():
            if (code := self._process.poll()) is not None:
                raise RAdapterError(f"tritonserver did not start: {how_it_ended(code)}: {self._messages.reason()}")
            if time.monotonic() > deadline:
                why = f"was not ready after {self._timeout:g} s: {self._messages.reason()}"
                raise RAdapterError(f"tritonserver {why}; allow more with --timeout")
            time.sleep(0.05)
        hide_argument(self._process.pid, self._secret)
        self.refresh_shared_memory()
        warm_up(self.control, self.models, max(1.0, deadline - time.monotonic()))
        self._backlog = Backlog(
            self.metrics_url, self._folder / WAITING, self._processes_of_models, max_waiting=self._max_waiting
        ).start()
        self.check()

    def _processes_of_models(self) -> dict[str, int]:
        return {name: processes_of(model) for name, model in list(self.offered.items())}

    def _kill(self) -> None:
        backlog, self._backlog = self._backlog, None
        if backlog is not None:
            backlog.stop()
        process, self._process, self._watch = self._process, None, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._folder is not None:
            hide_shared_memory(self._folder)
