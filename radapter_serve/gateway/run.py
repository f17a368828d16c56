"""Running the gateway: in this process, or as a child of another command."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import uvicorn

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.gateway.app import Gateway
from radapter_serve.gateway.connection import connection
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import Triton, Upstream
from radapter_serve.server.processes import STOPPED, Process, ending_with_parent, how_it_ended
from radapter_serve.server.watch import GATEWAY

KEEP_ALIVE = 30  # seconds that a connection stays open between requests
DRAIN = 20  # seconds that running requests have when the gateway stops


def server(settings: Settings, connect: Callable[[], Upstream] | None = None) -> uvicorn.Server:
    """The gateway as a uvicorn server that has not started.

    Args:
        settings: of the gateway.
        connect: makes the way to Triton; gRPC to `settings.server` if None.
    """
    gateway = Gateway(settings, connect or partial(Triton, settings.server))
    config = uvicorn.Config(
        gateway.app,
        http=connection(settings.max_connections),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=DRAIN,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise RAdapterError(
            f"--tls-certificate {settings.tls_certificate} and --tls-key {settings.tls_key}: "
            f"{getattr(error, 'strerror', None) or reason(error)}; give two PEM files that belong together"
        ) from None
    return uvicorn.Server(config)


def serve(settings: Settings, started: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM; running requests then have some seconds to end.

    Args:
        settings: of the gateway.
        started: called with the gateway's URL once it listens.

    Raises:
        RAdapterError: a setting that is not allowed, or a port that is taken.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="radapter-gateway: %(message)s")
    logging.getLogger("radapter-gateway").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what callers do wrong is answered, not logged
    with listen(settings) as listener:
        _allow_files(settings.max_connections)
        host, port = listener.getsockname()[:2]
        scheme = "https" if settings.tls_certificate else "http"
        started(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
        server(settings).run([listener])


def listen(settings: Settings, where: str = "--") -> socket.socket:
    """The socket that the settings ask for; `where` is how the flags for host and port begin."""
    address = settings.check(where)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, settings.port), family=family, backlog=settings.max_connections)
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)}; choose another with {where}port"
        raise RAdapterError(f"cannot listen on {settings.host} port {settings.port}: {why}") from None
    # Else an answer's body waits 40 ms for the caller to confirm its headers: asyncio sees to that for its own sockets.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def command(settings: Settings) -> list[str]:
    """The command that runs a gateway with these settings, for a process of its own."""
    words = [sys.executable, "-m", "radapter_serve.cli.gateway"]
    for field in fields(settings):
        value, flag = getattr(settings, field.name), f"--{field.name.replace('_', '-')}"
        if value != field.default:
            words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def start(settings: Settings) -> subprocess.Popen[bytes]:
    """Start a gateway in a process of its own, which ends with the thread that starts it; SIGTERM stops it in order."""
    settings.check()
    # In a session of its own: Ctrl-C reaches this process only, which then stops the gateway in order.
    return subprocess.Popen(ending_with_parent(command(settings)), stdin=subprocess.DEVNULL, start_new_session=True)


class Child:
    """A gateway in a process of its own, as a context manager, for a `Supervisor` to keep up.

    Args:
        settings: of the gateway.
    """

    name = GATEWAY

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start(self) -> None:
        """Start it, also again."""
        self._process = start(self._settings)

    def died(self) -> str | None:
        """Why it no longer runs; None while it does. What a signal has stopped is killed."""
        if (code := self._process.poll()) is not None:
            return how_it_ended(code)
        if Process.of(self._process.pid).state != "T":
            return None
        self._process.kill()
        self._process.wait()
        return STOPPED

    def __enter__(self) -> Child:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(DRAIN + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _allow_files(connections: int) -> None:
    """Each connection is an open file; the usual limit of a process is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
