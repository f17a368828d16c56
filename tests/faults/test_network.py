"""Calls over a network that is slow, silent or cut."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from radapter_client import Client
from tests.faults.conftest import ask

pytestmark = pytest.mark.triton


class BadNetwork:
    """Passes bytes between callers and a server, as badly as a test says."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0  # seconds that each piece of bytes waits
        self.silent = False  # bytes are swallowed, while all connections stay open
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection in the middle of what it carries, but take new ones."""
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += [caller, server]
                for pair in ((caller, server), (server, caller)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay)
                if not self.silent:
                    target.sendall(data)
        for connection in (source, target):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        source.close()


@pytest.mark.parametrize("way", ["grpc", "http", "gateway", "engine"])
def test_a_network_that_is_slow_silent_and_cut(way: str, request: pytest.FixtureRequest) -> None:
    if way in ("gateway", "engine"):
        url = request.getfixturevalue(way).url
    else:
        url = getattr(request.getfixturevalue("running"), f"{way}_url")
    host, _, port = url.rpartition(":")
    with (
        contextlib.closing(BadNetwork(int(port))) as network,
        Client(f"{host}:{network.port}") as client,
        ThreadPoolExecutor(1) as threads,
    ):
        assert ask(client) == "an answer"
        network.delay = 0.3
        assert ask(client, timeout=30.0) == "an answer"
        network.delay = 0.0
        network.silent = True
        began = time.monotonic()
        assert ask(client, timeout=1.0) == "Timeout None"
        assert time.monotonic() - began < 10
        network.silent = False
        network.cut()
        assert ask(client, timeout=30.0) == "an answer"
        call = threads.submit(ask, client, b'{"sleep": 1}', timeout=30.0)
        time.sleep(0.5)
        network.cut()
        assert call.result(40) == "an answer"
