"""Where `radapter-release` speaks with a running `radapter-serve`: a socket in the server's folder,
lines of JSON.

The folder is open to its owner only. Where there are no such sockets, as in Python on Windows, it
has a file with the number of a port of this machine and a secret that requests must have. A
request is one line, such as `{"do": "load", "releases": [2]}`. The answer is lines of `{"say":
...}`, and a last one of `{"done": ...}` or `{"error": ...}`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.server.processes import FOLDER_PREFIX
from radapter_serve.server.releases import ReleaseChanges

SOCKET = "release.sock"
PORT = "release.port"
MAX_CALLERS = 8  # callers at once
MAX_REQUEST_BYTES = 4096  # bytes of a request
READ_TIMEOUT_SECONDS = 5.0  # seconds to wait for a request
CLEANUP_INTERVAL_SECONDS = (
    15.0  # seconds between two looks whether an index still needs an older release
)


class AdminSocket:
    """Hears requests for a server, as a context manager.

    Args:
        folder: of the server.
        releases: of the server.
    """

    def __init__(self, folder: Path, releases: ReleaseChanges) -> None:
        self._folder = folder
        self._releases = releases
        self._callers = threading.BoundedSemaphore(MAX_CALLERS)
        self._closed = threading.Event()

    def __enter__(self) -> AdminSocket:
        self._socket, self._secret = _listen(self._folder)
        self._socket.settimeout(CLEANUP_INTERVAL_SECONDS)
        threading.Thread(target=self._run, name="admin socket", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                caller, _ = self._socket.accept()
            except TimeoutError:
                self._releases.remove_unneeded()
                continue
            except OSError:
                return
            if not self._callers.acquire(blocking=False):
                caller.close()
                continue
            # Not shared with others: tritonserver ends with the thread that started it.
            threading.Thread(
                target=self._serve, args=(caller,), name="admin socket caller", daemon=True
            ).start()

    def _serve(self, caller: socket.socket) -> None:
        def say(**line: Any) -> None:
            # Who left is told nothing; what he asked for goes on.
            with contextlib.suppress(OSError):
                caller.sendall(json.dumps(line).encode() + b"\n")

        with caller:
            try:
                caller.settimeout(READ_TIMEOUT_SECONDS)
                with caller.makefile("rb") as lines:
                    request = json.loads(lines.readline(MAX_REQUEST_BYTES))
                if not hmac.compare_digest(str(request.get("secret", "")), self._secret):
                    raise ValueError("its secret is another")
                say(done=self._answer(request, lambda line: say(say=line)))
            except RAdapterError as error:
                say(error=str(error))
            except (OSError, ValueError, TypeError, KeyError) as error:
                say(
                    error=(
                        f"this server does not understand the request ({error}); use the"
                        " radapter-release of its version"
                    )
                )
            finally:
                self._callers.release()

    def _answer(self, request: dict[str, Any], say: Callable[[str], None]) -> Any:
        if request["do"] == "load":
            return self._releases.load([int(one) for one in request["releases"]], say)
        if request["do"] == "rollback":
            return self._releases.rollback(say)
        if request["do"] == "state":
            return self._releases.state()
        raise ValueError(request["do"])


def ask(
    folder: Path, request: dict[str, Any], say: Callable[[str], None] = lambda line: None
) -> Any:
    """Ask the server that has this folder.

    Args:
        folder: of the server.
        request: as above.
        say: called with the lines before the answer.

    Raises:
        RAdapterError: the server refuses, or ends meanwhile.
        OSError: no server listens there.
    """
    seconds = READ_TIMEOUT_SECONDS if request["do"] == "state" else None
    server, secret = _connect(folder, seconds)
    with server:
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
    """The folder of the running server of a model repository; None if there is none.

    Args:
        repository: the model repository.
        http_port: which of several; any if None.

    Raises:
        RAdapterError: several servers serve it, or none of this port.
    """
    found = {}
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        # Another user's, or one that is gone.
        with contextlib.suppress(OSError, ValueError, RAdapterError):
            state = ask(folder, {"do": "state"})
            if state["repository"] == str(repository.resolve()):
                found[int(state["http_port"])] = folder
    if http_port is not None and http_port not in found:
        ports = ", ".join(map(str, sorted(found))) or "no port at all"
        raise RAdapterError(
            f"no server of {repository} listens on port {http_port} of this machine, but on {ports}"
        )
    if http_port is None and len(found) > 1:
        raise RAdapterError(
            f"several servers serve {repository}; choose one: --http-port"
            f" {' or '.join(map(str, sorted(found)))}"
        )
    return next(iter(found.values()), None) if http_port is None else found[http_port]


def _listen(folder: Path) -> tuple[socket.socket, str]:
    """A socket that listens for requests, and the secret that they must have."""
    if hasattr(socket, "AF_UNIX"):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(folder) as path:
            listener.bind(path)
        listener.listen(MAX_CALLERS)
        return listener, ""
    listener = socket.create_server(("127.0.0.1", 0), backlog=MAX_CALLERS)
    secret = secrets.token_hex(32)
    with staged(folder / PORT) as file:
        file.write_text(f"{listener.getsockname()[1]} {secret}", encoding="ascii")
    return listener, secret


def _connect(folder: Path, seconds: float | None) -> tuple[socket.socket, str]:
    """A connection to the server that has this folder, and the secret of its requests."""
    if hasattr(socket, "AF_UNIX"):
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.settimeout(seconds)
        try:
            with _short(folder) as path:
                server.connect(path)
        except BaseException:
            server.close()
            raise
        return server, ""
    port, secret = (folder / PORT).read_text(encoding="ascii").split()
    return socket.create_connection(("127.0.0.1", int(port)), seconds), secret


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """The socket's path, short enough for the system however long the folder's is."""
    if not Path("/proc/self/fd").is_dir():
        yield str(folder / SOCKET)
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{SOCKET}"
    finally:
        os.close(handle)
