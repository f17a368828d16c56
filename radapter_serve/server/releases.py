"""`ReleaseServer`, whose releases can change while it runs, and `admin_socket`, through which
`radapter-release` changes them.

The socket listens on this machine only. Its port, and the secret of each request, are in the name
of an empty file in the server's folder, which only its owner can read: even a full disk has room
for an empty file. A request is a line of JSON, such as `{"do": "load", "releases": [2]}`; the
answer is lines of `{"say": ...}`, and a last line `{"done": ...}` or `{"error": ...}`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import socketserver
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from radapter_serve.encoders.precision import Choice, choose
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import check
from radapter_serve.release.release import Release
from radapter_serve.release.repository import (
    MODELS,
    Served,
    format_list,
    require_known,
)
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.launch import FOLDER_PREFIX
from radapter_serve.server.models import gpu

FILE = "release-{port}-{secret}"
MAX_CALLERS = 8  # requests answered at once
MAX_REQUEST_BYTES = 4096
READ_TIMEOUT_SECONDS = 5.0  # to wait for a request
Say = Callable[[str], None]


class ReleaseServer(ABC):
    """Serves releases of a model repository; `load` and `rollback` change them."""

    def __init__(self, config: ServerConfig) -> None:
        # Make paths absolute: the server's processes have another working directory.
        self.config = replace(
            config,
            model_repository=config.model_repository.resolve(),
            indexes=config.indexes.resolve(),
        )
        # Runtime and precision by the precisions of exports: what `auto` took for some releases
        # holds for later ones that were exported in the same.
        self._taken: dict[frozenset[str], tuple[str | None, str | None]] = {}
        self.note = ""  # about the precision, for people
        self.facts: dict[int, Release] = {}  # of the releases, as this server computes them
        self.served = Served(())
        self._changing = threading.Lock()
        self._stopping = False

    @abstractmethod
    def _take_over(self, wanted: Served, say: Say) -> None:
        """Check that the releases answer correctly, and serve them, or else go on as before."""

    def _choose(
        self,
        releases: Sequence[int],
        say: Say,
        *,
        device: int | None = None,
        compared: bool = False,
    ) -> Choice:
        """Choose the precision of releases and its runtime on this machine."""
        say("choosing the precision")
        config = self.config
        asked = config.runtime, config.precision
        runtime, precision = self._taken.get(self._kind(releases), asked)
        choice = choose(
            config.model_repository,
            releases,
            runtime,
            precision,
            config.encoder_threads,
            on_gpu=gpu() is not None,
            device=device,
            compared=compared,
            say=say,
        )
        self.note = self.note or choice.note
        return choice

    def _take(self, releases: Sequence[int], choice: Choice) -> None:
        """Keep a choice for later releases that were exported in the same precisions."""
        self._taken[self._kind(releases)] = choice.runtime, choice.precision

    def _kind(self, releases: Sequence[int]) -> frozenset[str]:
        folder = self.config.model_repository / MODELS[-1]
        return frozenset(Release.load(folder / str(number)).precision for number in releases)

    def load(self, releases: Sequence[int], say: Say = lambda line: None) -> str:
        """Serve these releases instead of the present ones, which stay if a new one does not
        answer correctly; returns a line about the result.
        """
        wanted = require_known(self.config.model_repository, releases)
        return self._change(self.served.next(wanted), say)

    def rollback(self, say: Say = lambda line: None) -> str:
        """Serve the previous releases again, like `load`."""
        return self._change(self.served.back(), say)

    def end_changes(self, seconds: float) -> None:
        """Stop a running change of releases at its next step, and wait for it, so many seconds at
        most; later changes are refused.
        """
        self._stopping = True
        if self._changing.acquire(timeout=seconds):
            self._changing.release()

    def describe(self) -> dict[str, Any]:
        """The releases and the address of the server, for `radapter-release`."""
        endpoints = self.config.endpoints
        return {
            "repository": str(self.config.model_repository),
            "indexes": str(self.config.indexes),
            "http_port": endpoints.http_port,
            "url": endpoints.http_url,
            "releases": self.served.releases,
            "before": self.served.before,
        }

    def _change(self, wanted: Served, say: Say) -> str:
        repository = self.config.model_repository
        named = format_list(wanted.releases)
        if wanted.releases == self.served.releases:
            return f"release {named} is served already"
        if not self._changing.acquire(blocking=False):
            raise RAdapterError(
                "the server changes its releases already; wait for it: radapter-release list"
            )

        def say_or_stop(line: str) -> None:
            if self._stopping:
                raise RAdapterError("the server stops")
            say(line)

        try:
            check(repository, wanted.releases, say_or_stop)
            self._take_over(wanted, say_or_stop)
            self.served = wanted
        except RAdapterError as error:
            still = f"release {format_list(self.served.releases)} is served as before"
            raise RAdapterError(f"release {named} was not loaded, and {still}: {error}") from error
        finally:
            self._changing.release()
        try:
            wanted.save(repository)
        except OSError as error:
            return (
                f"release {named} is served, until the server ends: {repository} cannot be written"
                f" ({error.strerror}), so a restart forgets it"
            )
        return f"release {named} is served"


@contextlib.contextmanager
def admin_socket(folder: Path, server: ReleaseServer) -> Iterator[None]:
    """Answer the requests of `radapter-release` to a server, within the block."""
    secret = secrets.token_hex(32)
    callers = threading.BoundedSemaphore(MAX_CALLERS)

    class Handler(socketserver.StreamRequestHandler):
        timeout = READ_TIMEOUT_SECONDS

        def handle(self) -> None:
            if callers.acquire(blocking=False):
                try:
                    _answer(self, server, secret)
                finally:
                    callers.release()

    # A thread for each caller, because tritonserver ends with the thread that started it.
    listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    listener.block_on_close = False
    (folder / FILE.format(port=listener.server_address[1], secret=secret)).touch()
    threading.Thread(
        target=listener.serve_forever, args=(0.1,), name="admin socket", daemon=True
    ).start()
    try:
        yield
    finally:
        listener.shutdown()
        listener.server_close()


def _answer(caller: socketserver.StreamRequestHandler, server: ReleaseServer, secret: str) -> None:
    def say(**line: Any) -> None:
        # A change goes on after its caller has disconnected.
        with contextlib.suppress(OSError):
            caller.wfile.write(json.dumps(line).encode() + b"\n")

    try:
        request = json.loads(caller.rfile.readline(MAX_REQUEST_BYTES))
        if not hmac.compare_digest(str(request["secret"]).encode(), secret.encode()):
            raise ValueError("it has another secret")
        if request["do"] == "load":
            releases = [int(number) for number in request["releases"]]
            say(done=server.load(releases, lambda line: say(say=line)))
        elif request["do"] == "rollback":
            say(done=server.rollback(lambda line: say(say=line)))
        elif request["do"] == "state":
            say(done=server.describe())
        else:
            raise ValueError(request["do"])
    except RAdapterError as error:
        say(error=str(error))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        say(
            error=f"this server does not understand the request ({error}); use the"
            " radapter-release of its version"
        )


def ask(folder: Path, request: dict[str, Any], say: Say = lambda line: None) -> Any:
    """Ask the server of a folder, which refuses with an `RAdapterError`; an `OSError` if none
    listens. `say` is called with the lines before the answer.
    """
    files = list(folder.glob(FILE.format(port="*", secret="*")))
    if not files:
        raise FileNotFoundError(folder)
    _, port, secret = files[-1].name.split("-")
    # A change of releases has no time limit.
    timeout = READ_TIMEOUT_SECONDS if request["do"] == "state" else None
    with socket.create_connection(("127.0.0.1", int(port)), timeout) as server:
        server.sendall(json.dumps({**request, "secret": secret}).encode() + b"\n")
        with server.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "done" in answer:
                    return answer["done"]
                if "error" in answer:
                    raise RAdapterError(answer["error"])
                say(answer["say"])
    raise RAdapterError(
        "the server ended before it had answered; see what it serves now: radapter-release list"
    )


def find_server(repository: Path, http_port: int | None = None) -> Path | None:
    """The folder of a repository's running server, or None; `http_port` chooses one of several."""
    servers = {}
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        # Skip folders of other users, and of servers that are gone.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RAdapterError):
            state = ask(folder, {"do": "state"})
            if state["repository"] == str(repository.resolve()):
                servers[int(state["http_port"])] = folder
    if http_port is not None and http_port not in servers:
        ports = ", ".join(map(str, sorted(servers))) or "no port at all"
        raise RAdapterError(
            f"no server of {repository} listens on port {http_port} of this machine, but on {ports}"
        )
    if http_port is None and len(servers) > 1:
        raise RAdapterError(
            f"several servers serve {repository}; choose one: --url"
            f" {' or '.join(f'http://localhost:{port}' for port in sorted(servers))}"
        )
    return next(iter(servers.values()), None) if http_port is None else servers[http_port]
