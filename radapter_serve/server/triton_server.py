"""Starting and stopping tritonserver."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import check
from radapter_serve.release.repository import AUTO, RUNTIMES, newest_export, versions_of
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.installation import Installation, find_tritonserver
from radapter_serve.server.launch import EXIT_TIMEOUT, SECRET_HEADER, command_line, lay_out, server_environment
from radapter_serve.server.processes import FOLDER_PREFIX, children, hide_shared_memory, remove, remove_leftovers
from radapter_serve.server.runtime_choice import Configured, Measured, configure
from radapter_serve.signals import handled
from radapter_serve.threads import total

# A proxy of the environment is not for this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_ports() -> tuple[int, int, int]:
    """Three ports that nobody listens on, for a server that only this machine uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        first, second, third = (one.getsockname()[1] for one in sockets)
    return first, second, third


def models_of(repository: Path) -> dict[str, list[int]]:
    """The models of a repository and their versions.

    Raises:
        RAdapterError: no such folder, or it holds no release.
    """
    if not repository.is_dir():
        raise RAdapterError(f"the model repository {repository} does not exist; make it with: radapter-export")
    models = {
        path.parent.name: versions
        for path in sorted(repository.glob("*/config.pbtxt"))
        if (versions := versions_of(path.parent))
    }
    if not models:
        raise RAdapterError(f"the model repository {repository} holds no release; make one with: radapter-export")
    return models


class TritonServer(Endpoints):
    """A running tritonserver, as a context manager.

    The server ends with the thread that started it, so that a killed program leaves none behind.

    It serves what it finds at its start, and no caller can load a model into it: that would let him run his own code.
    A new export is served after a restart.

    Args:
        model_repository: folder that radapter-export has filled.
        host: address or name to listen on; loopback by default, for the server knows no authentication.
        http_port: port of the HTTP endpoint.
        grpc_port: port of the gRPC endpoint.
        metrics_port: port of the Prometheus metrics.
        indexes: folder of the indexes for `retrieve`; need not be there yet.
        runtime: that runs the encoders, once it is checked to compute what torch computed: onnxruntime, openvino or
            tensorrt; auto measures and takes the fastest. As exported if None.
        threads: that compute in an encoder, shared by its instances; one a core if None.
        timeout: seconds to wait until every model is ready.
        log: file for the server's messages; None keeps them for the report of a failure only.
        verbose: let the server write its messages to this process's stderr instead.

    Raises:
        RAdapterError: an unknown host or runtime, a time-out or threads that are none; at `start` (or on entering): no
            server, no release, a port in use, a runtime that is not right here, or a model that does not load.
    """

    def __init__(
        self,
        model_repository: str | Path,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        *,
        indexes: str | Path = "indexes",
        runtime: str | None = None,
        threads: int | None = None,
        timeout: float = 120.0,
        log: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(host, http_port, grpc_port, metrics_port)
        self.model_repository = Path(model_repository).resolve()
        self.indexes = Path(indexes).resolve()
        if not timeout > 0:
            raise RAdapterError(f"--timeout is {timeout:g}; allowed are seconds above 0")
        if runtime not in (None, AUTO, *RUNTIMES):
            raise RAdapterError(f"--runtime is {runtime}; allowed are {', '.join((*RUNTIMES, AUTO))}")
        if threads is not None and threads < 1:
            raise RAdapterError(f"--threads is {threads}; allowed are 1 and more")
        self._timeout, self._log, self._verbose = timeout, Path(log) if log else None, verbose
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._lock: int | None = None
        self._dead: set[int] = set()
        self._stubs: dict[int, str] = {}
        self._runtime, self.threads = runtime, threads or total()
        self._secret = secrets.token_hex(32)
        self.measured: list[Measured] = []
        self.unchecked: list[int] = []  # releases without digests
        self.models: dict[str, list[int]] = {}

    def start(self, progress: Callable[[str], None] = lambda line: None) -> TritonServer:
        """Start the server and wait until all its models are ready.

        Args:
            progress: called with a short line before each step that takes long.
        """
        self.models = models_of(self.model_repository)
        self.check_ports()
        self.unchecked = check(self.model_repository, newest_export(self.model_repository), progress)
        installation = find_tritonserver()
        remove_leftovers()
        configured = configure(self.model_repository, self._runtime, self.threads, installation, progress)
        self.measured = configured.measured
        progress(f"starting tritonserver for {self.model_repository}")
        try:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
                self._lock = os.open(self._folder, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                self._launch(installation, self._folder, configured)
            except OSError as error:
                why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
                raise RAdapterError(
                    f"cannot write into {tempfile.gettempdir()}: {why}; free some space, or set TMPDIR to another"
                ) from None
            self._wait_until_ready()
            hide_shared_memory(self._folder)
            self.models = self._served()
            self.check()
        except BaseException:
            self.stop()
            raise
        return self

    def wait(self) -> None:
        """Wait until the server ends, which it does not by itself.

        Raises:
            RAdapterError: the server, or the process of one of its models, is gone.
        """
        while True:
            self.check()
            time.sleep(1)

    def check(self) -> None:
        """Look after the server; to be called now and then, for Triton does not restart a model's process that died.

        Raises:
            RAdapterError: the server, or the process of one of its models, is gone.
        """
        process = self._process
        if process is not None and process.poll() == -signal.SIGSEGV:
            raise RAdapterError(
                "tritonserver ended by a segmentation fault, as a request of 4 MiB and more causes without the header "
                "Content-Type: application/json; start it again: radapter-serve"
            )
        if process is None or process.poll() is not None:
            raise RAdapterError(f"tritonserver ended by itself: {self._reason()}")
        found = children(process.pid)
        dead = {pid for pid, (state, _) in found.items() if state == "Z"}
        # The process of a model that is unloaded is dead for a moment, too.
        if gone := dead & self._dead:
            names = sorted({self._stubs.get(pid, str(pid)) for pid in gone})
            raise RAdapterError(
                f"the process of {', '.join(names)} died (killed? out of memory?) and Triton cannot replace it; "
                "start the server again: radapter-serve"
            )
        self._dead = dead
        for pid, (_, argument) in found.items():
            # .../MODEL/VERSION/model.py; for a moment the child is still a shell.
            if match := re.search(r"([^/]+)/(\d+)/[^/]+$", argument):
                self._stubs[pid] = f"{match[1]} version {match[2]}"

    def stop(self) -> None:
        """Stop the server and all its processes; nothing of it stays, in /dev/shm, /tmp or the model repository."""
        # What stops already must not be cut short by a second Ctrl-C.
        with handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process, self._process = self._process, None
            if process is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(EXIT_TIMEOUT + 5)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for cache in self.model_repository.glob("*/*/__pycache__"):  # the stub knows no PYTHONDONTWRITEBYTECODE
                shutil.rmtree(cache, ignore_errors=True)
            if self._folder is not None:
                remove(self._folder)
            if self._lock is not None:
                os.close(self._lock)
            self._folder = self._lock = None
            self._dead, self._stubs = set(), {}

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, installation: Installation, folder: Path, configured: Configured) -> None:
        lay_out(folder, installation, self.model_repository, self.models, configured.configs)
        with contextlib.ExitStack() as stack:
            try:
                output = None if self._verbose else stack.enter_context(self._messages.open("wb"))
            except OSError as error:
                raise RAdapterError(f"cannot write the log {self._messages}: {error.strerror}") from None
            self._process = subprocess.Popen(
                command_line(folder, installation, self.flags(), self._secret, configured.version_compatible),
                env=server_environment(installation, folder, self.indexes, self.threads),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                cwd=folder,  # a model's process imports from the current folder first
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops the server in order
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._ready():
            if self._process is None or self._process.poll() is not None:
                raise RAdapterError(f"tritonserver did not start: {self._reason()}")
            if time.monotonic() > deadline:
                raise RAdapterError(
                    f"tritonserver was not ready after {self._timeout:g} s: {self._reason()}; allow more with --timeout"
                )
            time.sleep(0.05)

    def _served(self) -> dict[str, list[int]]:
        """What the server itself says it serves: a config may leave versions of the folder out."""
        url, headers = f"{self.http_url}/v2/repository/index", {SECRET_HEADER: self._secret}
        request = urllib.request.Request(url, b'{"ready": true}', headers)
        with _OPENER.open(request, timeout=10) as response:
            models: dict[str, list[int]] = {}
            for entry in json.load(response):
                models.setdefault(entry["name"], []).append(int(entry["version"]))
        return {name: sorted(versions) for name, versions in sorted(models.items())}

    def _ready(self) -> bool:
        try:
            with _OPENER.open(f"{self.http_url}/v2/health/ready", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @property
    def _messages(self) -> Path:
        return self._log or (self._folder or Path()) / "server.log"

    def _reason(self) -> str:
        if self._verbose or not self._messages.exists():
            return "its messages above say why"
        where = self._log or "radapter-serve --verbose"
        why = reason(self._messages.read_text(encoding="utf-8", errors="replace"))
        return f"{why}; all its messages: {where}"


def reason(log: str) -> str:
    """The line of a server's log that says best why it failed: a model that did not load, else the last error."""
    lines = [line for line in log.splitlines() if not re.search("CudaDriver|NVML|DCGM", line)]  # said without a GPU
    errors = [line for line in lines if re.match(r"[EF]\d{4} ", line)]
    best = [line for line in errors if "failed to load" in line] or errors or [line for line in lines if line.strip()]
    if not best:
        return "it wrote nothing"
    return re.sub(r"^[EF]\d{4} \S+ +\d+ \S+\] ", "", best[-1]).strip().strip('"')
