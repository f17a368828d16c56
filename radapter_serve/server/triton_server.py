"""`TritonServer`: starts, changes and stops tritonserver."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2_grpc

from radapter_client.grpc import CHANNEL, decode, encode
from radapter_serve.errors import RAdapterError
from radapter_serve.files import disk_errors
from radapter_serve.process import STOPPING, SYSTEM, Clock, handled
from radapter_serve.release.config import ServedEncoder, check, encoders_of
from radapter_serve.release.release import Release
from radapter_serve.release.repository import MODELS, Served, check_repository
from radapter_serve.server import launch
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.control import Control, check_side_by_side, switch, warm_up
from radapter_serve.server.launch import Installation, find_tritonserver
from radapter_serve.server.models import (
    ModelEntry,
    check_agreement,
    check_shared_memory,
    configure_encoders,
    device_of,
    other_models,
    plan_models,
    processes_of,
)
from radapter_serve.server.releases import ReleaseServer, Say
from radapter_serve.server.watch import SERVER, Death, Watch, how_it_ended
from radapter_serve.triton.backlog import Backlog

_LOG = "server.log"  # in the server's folder
_READY_POLL_SECONDS = 0.05
# For all models to answer: at least, and for each process, as few cores start many in turn
_LEAST_TIMEOUT_SECONDS = 120.0
_TIMEOUT_SECONDS = 3.0
# Requests to an overloaded encoder
_MAX_ATTEMPTS = 20
_PAUSE_SECONDS = 0.5


class TritonServer(ReleaseServer):
    """A running tritonserver, as a context manager.

    The server ends with the thread that started it, so it does not outlive a killed program.

    Callers cannot load models into the server, because a model can run any code. `load` replaces
    the served releases, and a `Supervisor` restarts processes that died.

    Args:
        config: settings of the server.
        installation: the tritonserver to start; the one of this machine if None.
        clock: measures time and sleeps.

    Attributes:
        control: client of Triton's model control API, while the server runs.
        served: the served releases, and those served before.
        models: the loaded models, and their versions.

        warning: a warning about this machine's shared memory, or None.

    Raises:
        RAdapterError: at `start` (or on entering): no server, no release, a port in use, a runtime
            that cannot be used here, or a model that does not load or does not answer.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        installation: Installation | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        super().__init__(config)
        self.lock = threading.RLock()  # guards the process and the folder
        self.models: Mapping[str, list[int]] = {}
        self.warning: str | None = None
        self._secret = secrets.token_hex(32)
        self.control = Control(config.endpoints.http_url, self._secret)
        self._installation = installation
        self._clock = clock
        self.offered: dict[str, ModelEntry] = {}  # models in the server's folder
        self._folder: Path | None = None
        self._stack = contextlib.ExitStack()  # removes the folder
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: Watch | None = None
        self._backlog: Backlog | None = None

    @property
    def http_url(self) -> str:
        """For example `http://127.0.0.1:8000`."""
        return self.config.endpoints.http_url

    @property
    def grpc_url(self) -> str:
        """For example `grpc://127.0.0.1:8001`."""
        return self.config.endpoints.grpc_url

    @property
    def metrics_url(self) -> str:
        """For example `http://127.0.0.1:8002/metrics`."""
        return self.config.endpoints.metrics_url

    @property
    def pid(self) -> int | None:
        """Number of the server's process; None if it does not run."""
        return None if self._process is None else self._process.pid

    @property
    def folder(self) -> Path:
        """The server's folder, which only its owner can read.

        Raises:
            RAdapterError: the server does not run.
        """
        if self._folder is None:
            raise RAdapterError("the server does not run; start it with: radapter-serve")
        return self._folder

    @property
    def timeout(self) -> float:
        """Seconds to wait until all models answer."""
        processes = sum(map(processes_of, self.offered.values()))
        return self.config.timeout or max(_LEAST_TIMEOUT_SECONDS, _TIMEOUT_SECONDS * processes)

    def start(self, progress: Say = lambda line: None) -> TritonServer:
        """Start the server and wait until all its tasks have answered once.

        Args:
            progress: called with a short line before each long step.
        """
        repository = self.config.model_repository
        try:
            check_repository(repository)
            self.config.endpoints.check()
            served = Served.load(repository)
            check(repository, served.releases, progress)
            if self._installation is None:
                self._installation = find_tritonserver()
            self.offered = self._plan(served.releases, progress, others=True)
            self.warning = check_shared_memory(self.offered, self._installation.in_python)
            progress(f"starting tritonserver for {repository}")
            self._folder = self._stack.enter_context(launch.server_folder())
            with disk_errors(self._folder, launch.DISK_ADVICE):
                launch.lay_out(self._folder, self._installation, repository, self.offered)
            self._run("wb")
        except BaseException:
            self.stop()
            raise
        self.served = served
        return self

    def restart(self) -> None:
        """Start tritonserver again with the same models, whatever its state."""
        with self.lock:
            self._end_process(grace_seconds=0)
            self._run("ab")

    def reload(self, model: str) -> None:
        """Start the processes of a model again; their running calls fail, other models go on."""
        with self.lock:
            self.control.unload(model)
            self.control.load(model, timeout=self.timeout)
            self.refresh()

    def put(self, name: str, model: ModelEntry | None) -> None:
        """Change a model in the server's folder, without loading it; None removes the model."""
        launch.put(self.folder, self.config.model_repository, name, model)
        offered = {other: entry for other, entry in self.offered.items() if other != name}
        self.offered = offered if model is None else {**offered, name: model}

    def refresh(self) -> None:
        """Hide the processes' shared memory, and update `models`. Call it after loading models."""
        launch.hide_shared_memory(self.folder)
        if self._watch is not None:
            self._watch.models()  # so that the processes are known if they die before the next poll
        self.models = self.control.serving()

    def failures(self) -> list[Death]:
        """Deaths since the last call. Call it regularly: Triton does not watch its processes."""
        if self._process is None or self._watch is None:
            return [Death(SERVER, "it was not started, or it was stopped")]
        failures = self._watch.poll()
        code = self._process.poll()
        if code is None or code < 0:  # it runs, or a signal has ended it
            return failures
        return [Death(SERVER, f"{failure.why}: {self._reason()}") for failure in failures]

    def check(self) -> None:
        """Check that the server works, for programs without a `Supervisor`.

        Raises:
            RAdapterError: the server, or the process of one of its models, is gone.
        """
        for failure in self.failures():
            raise RAdapterError(f"{failure}; start the server again: radapter-serve")

    def cpu_seconds(self, models: Collection[str]) -> float:
        """CPU time in seconds that the processes of models have used."""
        return 0.0 if self._watch is None else self._watch.cpu_seconds(models)

    def pids(self, model: str) -> list[int]:
        """Numbers of a model's processes."""
        running = {} if self._watch is None else self._watch.models()
        return [pid for pid, name in running.items() if name == model]

    def kill(self, name: str) -> None:
        """End the processes of a model, or tritonserver itself, at once."""
        if self._watch is not None:
            self._watch.kill(name)

    def stop(self) -> None:
        """Stop the server and all its processes; leaves no files in /dev/shm, /tmp or the model
        repository.
        """
        # A second Ctrl-C must not cut this short.
        with handled(signal.SIG_IGN, signal.SIGINT, *STOPPING):
            self._end_process(grace_seconds=self.config.drain_seconds + 5)
            self._stack.close()
            self._folder = None

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _take_over(self, wanted: Served, say: Say) -> None:
        models = self._plan(wanted.releases, say)
        check_side_by_side(self.offered, models)
        new = [version for version in wanted.releases if version not in self.served.releases]
        with self.lock:
            switch(self, models, lambda: self._compare(new, say), say, self._clock)

    def _plan(
        self, releases: Sequence[int], progress: Say, *, others: bool = False
    ) -> dict[str, ModelEntry]:
        """Models of releases, and `others` of the repository, configured for this machine."""
        repository = self.config.model_repository
        device = device_of(repository, releases)
        choice = self._choose(releases, progress, device=device)
        encoders = configure_encoders(repository, releases, choice, self.config.encoder_threads)
        self._take(releases, choice)
        for version in releases:
            known = Release.load(repository / MODELS[-1] / str(version))
            # What was measured at the start holds for a release that goes on.
            self.facts[version] = self.facts.get(version) or choice.facts(known)
        models = other_models(repository, encoders) if others else {}
        models |= plan_models(repository, releases, encoders, self.facts)
        counts = self.config.instance_counts()
        return {name: model.with_instances(counts.get(name)) for name, model in models.items()}

    def _compare(self, releases: Sequence[int], say: Say) -> None:
        """Compare the loaded encoders of releases with torch's embeddings."""
        address = self.grpc_url.removeprefix("grpc://")
        with grpc.insecure_channel(address, CHANNEL) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            encoders = encoders_of(self.config.model_repository, releases) if releases else []
            for encoder in encoders:
                for version in encoder.versions:
                    say(f"comparing {encoder.name} of release {version} with torch's embeddings")
                    computed = replace(encoder, facts=self.facts[version])
                    check_agreement(computed, version, partial(_embed, stub, encoder, version))

    def _run(self, mode: Literal["wb", "ab"]) -> None:
        """Start the process, and wait until all tasks have answered; `mode` begins the log or
        appends.
        """
        deadline = self._clock.monotonic() + self.timeout
        self._start_process(mode)

        # Wait until all models are loaded. tritonserver 2.51 sometimes aborts at its start with
        # lock_exception, and starts the next time: triton-inference-server/server#8882.
        again = False
        while not self.control.is_ready():
            assert self._process is not None
            code = self._process.poll()
            if code == -signal.SIGABRT and not again:
                print(
                    f"tritonserver died before it was ready: {how_it_ended(code)};"
                    " starting it once again",
                    file=sys.stderr,
                )
                self._end_process(grace_seconds=0)
                self._start_process("ab")
                again = True
            elif code is not None:
                raise RAdapterError(
                    f"tritonserver did not start: {how_it_ended(code)}: {self._reason()}"
                )
            if self._clock.monotonic() > deadline:
                raise RAdapterError(
                    f"tritonserver was not ready after {self.timeout:g} s: {self._reason()};"
                    " allow more with --timeout"
                )
            self._clock.sleep(_READY_POLL_SECONDS)

        assert self._process is not None
        launch.hide_argument(self._process.pid, self._secret)
        self.refresh()
        warm_up(self.control, self.models, max(1.0, deadline - self._clock.monotonic()))
        self._backlog = Backlog(
            self.metrics_url,
            self.folder / launch.SURPLUS_FOLDER,
            lambda: {name: processes_of(model) for name, model in self.offered.items()},
            self.config.max_waiting,
        )
        self.check()

    def _start_process(self, mode: Literal["wb", "ab"]) -> None:
        assert self._installation is not None
        config = self.config
        folder = self.folder
        command = launch.command_line(
            folder, self._installation, config, self._secret, self.offered
        )
        with contextlib.ExitStack() as stack:
            output = None  # this process's stderr
            if not config.verbose:
                with disk_errors(folder, launch.DISK_ADVICE):
                    output = stack.enter_context((folder / _LOG).open(mode))
            self._process = subprocess.Popen(
                command,
                env=launch.server_environment(folder, self._installation, config),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                cwd=folder,  # a model's process imports from the current folder first
                umask=0o077,  # no other user reads its memory in /dev/shm
                # Ctrl-C reaches this process only, which then stops the server in order.
                start_new_session=True,
            )
        self._watch = Watch(self._process)

    def _end_process(self, *, grace_seconds: float) -> None:
        if self._process is not None:
            # End the leader of its process group in order, then kill the rest of the group.
            if grace_seconds > 0:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(grace_seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._backlog is not None:
            self._backlog.stop()
        self._process = self._watch = self._backlog = None
        if self._folder is not None:
            launch.hide_shared_memory(self._folder)

    def _reason(self) -> str:
        """The reason of a failure, and where to read the rest."""
        if self.config.verbose:
            return "its messages above say why"
        log = (self.folder / _LOG).read_text(encoding="utf-8", errors="replace")
        return f"{launch.reason_in(log)}; all its messages: radapter-serve --verbose"


def _embed(
    stub: service_pb2_grpc.GRPCInferenceServiceStub,
    encoder: ServedEncoder,
    version: int,
    *arrays: NDArray[Any],
) -> NDArray[np.float32]:
    """Call an encoder of a running server."""
    names = [tensor.name for tensor in encoder.config.input]
    message = encode(encoder.name, str(version), dict(zip(names, arrays, strict=True)), ())
    for attempt in range(_MAX_ATTEMPTS):
        try:
            [embeds] = decode(stub.ModelInfer(message, timeout=120.0)).outputs.values()
            break
        except grpc.RpcError as error:
            # Callers of the served release may fill the queue.
            if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt == _MAX_ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE_SECONDS)
    return np.asarray(embeds, np.float32)
