"""Starting and stopping tritonserver."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from radapter_serve.environment import INDEXES
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import AUTO, RUNTIMES, TENSORRT, encoders_of, versions_of
from radapter_serve.runtimes.tensorrt.plan import Sidecar, check_plan
from radapter_serve.server.installation import Installation, find_tritonserver
from radapter_serve.server.processes import (
    FOLDER_PREFIX,
    children,
    hide_shared_memory,
    remove,
    remove_leftovers,
    shm_prefix,
    undisturbed,
)
from radapter_serve.server.runtime_choice import Measured, check, fastest, measure
from radapter_serve.threads import environment, share, total

_EXIT_TIMEOUT = 5
# What a caller could read or change the server's memory, files and log by; open to who sends the secret of this server.
_RESTRICTED = "shared-memory,model-repository,trace,logging"
_RESTRICTING = ("http-restricted-api", "grpc-restricted-protocol")
_KEY = "radapter-secret"
# Runs the server so that it ends when the process (more exactly: the thread) that started it is killed.
_LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"

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


class TritonServer:
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
        self.model_repository = Path(model_repository).resolve()
        self.indexes = Path(indexes).resolve()
        if not timeout > 0:
            raise RAdapterError(f"--timeout is {timeout:g}; allowed are seconds above 0")
        if runtime not in (None, AUTO, *RUNTIMES):
            raise RAdapterError(f"--runtime is {runtime}; allowed are {', '.join((*RUNTIMES, AUTO))}")
        if threads is not None and threads < 1:
            raise RAdapterError(f"--threads is {threads}; allowed are 1 and more")
        self.host, self.http_port, self.grpc_port, self.metrics_port = _ip(host), http_port, grpc_port, metrics_port
        self._timeout, self._log, self._verbose = timeout, Path(log) if log else None, verbose
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._lock: int | None = None
        self._dead: set[int] = set()
        self._stubs: dict[int, str] = {}
        self._runtime, self.threads = runtime, threads or total()
        self._secret = secrets.token_hex(32)
        self.measured: list[Measured] = []
        self._plans: list[Sidecar] = []
        self.models: dict[str, list[int]] = {}

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def address(self) -> str:
        """Host to reach the server at from this machine."""
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{address}]" if self._v6 else address

    @property
    def _v6(self) -> bool:
        return ":" in self.host

    @property
    def http_url(self) -> str:
        """For example `http://127.0.0.1:8000`."""
        return f"http://{self.address}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """For example `grpc://127.0.0.1:8001`."""
        return f"grpc://{self.address}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """For example `http://127.0.0.1:8002/metrics`."""
        return f"http://{self.address}:{self.metrics_port}/metrics"

    def start(self, progress: Callable[[str], None] = lambda line: None) -> TritonServer:
        """Start the server and wait until all its models are ready.

        Args:
            progress: called with a short line before each step that takes long.
        """
        self.models = models_of(self.model_repository)
        self._check_ports()
        installation = find_tritonserver()
        remove_leftovers()
        configs = self._configure(installation, progress)
        progress(f"starting tritonserver for {self.model_repository}")
        try:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
                self._lock = os.open(self._folder, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                self._launch(installation, self._folder, configs)
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
        with undisturbed():
            process, self._process = self._process, None
            if process is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_TIMEOUT + 5)
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

    def _check_ports(self) -> None:
        ports = {"--http-port": self.http_port, "--grpc-port": self.grpc_port, "--metrics-port": self.metrics_port}
        if len(set(ports.values())) < len(ports):
            raise RAdapterError(f"the ports must differ: {', '.join(f'{f} {p}' for f, p in ports.items())}")
        for flag, port in ports.items():
            if not 0 < port < 65536:
                raise RAdapterError(f"{flag} is {port}; allowed are 1 to 65535")
            family = socket.AF_INET6 if self._v6 else socket.AF_INET
            try:
                socket.create_server((self.host, port), family=family).close()
            except OSError as error:
                why = f"{os.strerror(error.errno or 0)}; choose another with {flag}"
                raise RAdapterError(f"cannot listen on {self.host} port {port}: {why}") from None

    def _configure(self, installation: Installation, progress: Callable[[str], None]) -> dict[str, str]:
        """Configs of the encoders for this machine, by name: their runtime and their threads."""
        encoders = encoders_of(self.model_repository)
        threads = {encoder.name: share(self.threads, encoder.instances) for encoder in encoders}
        chosen = self._runtime
        if chosen == AUTO:
            self.measured = measure(encoders, threads, installation.backends, progress)
            chosen = fastest(self.measured)
        configs, self._plans = {}, []
        for encoder in encoders:
            runtime = chosen or encoder.runtime
            if runtime not in installation.backends:
                raise RAdapterError(f"{installation.binary} has no backend {runtime}, which {encoder.name} asks for")
            files = [encoder.file(version, runtime) for version in encoder.versions]
            if runtime == TENSORRT:
                self._plans += [check_plan(file.parent) for file in files]
            if runtime != encoder.runtime and not self.measured:
                progress(f"checking {encoder.name} by {runtime}")
                try:
                    check(encoder, runtime, threads[encoder.name])
                except RAdapterError as error:
                    raise RAdapterError(
                        f"{error}; leave --runtime out ({encoder.name} was exported for {encoder.runtime}), or export "
                        f"for it: radapter-export --runtime {runtime}"
                    ) from error
            configs[encoder.name] = encoder.configured(runtime, threads[encoder.name])
        return configs

    def _launch(self, installation: Installation, folder: Path, configs: Mapping[str, str]) -> None:
        backends, models = folder / "backends", folder / "models"
        backends.mkdir()
        installation.assemble(backends)
        # Triton loads every folder that it sees: the models, and nothing that lies beside them.
        models.mkdir()
        for name in self.models:
            source, target = self.model_repository / name, models / name
            if name not in configs:
                target.symlink_to(source)
                continue
            target.mkdir()
            (target / "config.pbtxt").write_text(configs[name], encoding="utf-8")
            for version in self.models[name]:
                (target / str(version)).symlink_to(source / str(version))
        version_compatible = any(plan.options.version_compatible for plan in self._plans)
        command = [
            str(installation.binary),
            f"--model-repository={models}",
            f"--backend-directory={backends}",
            *([f"--cache-directory={installation.caches}"] if installation.caches else []),
            *(f"--{kind}-address={'ipv6:' if self._v6 else ''}{self.host}" for kind in ("http", "metrics")),
            f"--grpc-address={f'[{self.host}]' if self._v6 else self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            "--model-control-mode=none",  # explicit takes models, and with them code, from whoever asks
            *(f"--{flag}={_RESTRICTED}:{_KEY}={self._secret}" for flag in _RESTRICTING),
            "--disable-auto-complete-config",  # configs of an export are complete; this halves the start
            f"--exit-timeout-secs={_EXIT_TIMEOUT}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix(folder)}",
            # Such a plan brings a runtime of its own, code that Triton runs only if it is told to.
            *(["--backend-config=tensorrt,version-compatible=true"] if version_compatible else []),
        ]
        with contextlib.ExitStack() as stack:
            try:
                output = None if self._verbose else stack.enter_context(self._messages.open("wb"))
            except OSError as error:
                raise RAdapterError(f"cannot write the log {self._messages}: {error.strerror}") from None
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command],
                # ONNX Runtime leaves a file in TMPDIR.
                env={
                    **_environment(installation),
                    **environment(self.threads),
                    "TMPDIR": str(folder),
                    INDEXES: str(self.indexes),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
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
        url, headers = f"{self.http_url}/v2/repository/index", {_KEY: self._secret}
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


def _ip(host: str) -> str:
    """The address of a host name; IPv4 where it has both."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RAdapterError(
            f"--host {host!r}: {why}; give a name or an address of this machine, such as localhost or 0.0.0.0"
        ) from None
    return str(min(found, key=lambda info: info[0] != socket.AF_INET)[4][0])


def _environment(installation: Installation) -> dict[str, str]:
    variables = dict(os.environ)
    libraries = [*map(str, installation.libraries), variables.get("LD_LIBRARY_PATH", "")]
    variables["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    # The model processes take their Python from the first python3 on PATH.
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables.get('PATH', '')}"
    variables["TOKENIZERS_PARALLELISM"] = "false"
    return variables
