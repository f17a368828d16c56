"""Attacks on the gateway's connections cost other callers no time, and the gateway no memory."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme

from radapter_serve.server.endpoints import free_ports
from tests.hostile.harness import memory, open_files, until

PATIENCE = 1.0  # seconds that this gateway gives its callers, in place of 8 or 10
LATE = 3.0  # seconds for an answer to another caller
MOST = 48  # MiB that an attack may add to the memory of the gateway
INFER = b"/v2/models/embed_text/infer"
ALIVE = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass
class Attacked:
    """A gateway in a process of its own."""

    port: int
    process: subprocess.Popen[bytes]
    tls: bool

    def connect(self) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        if not self.tls:
            return plain
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(plain)

    def memory(self) -> int:
        return memory(self.process.pid)

    def open_files(self) -> int:
        return open_files(self.process.pid)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), self.connect() as it:
            it.sendall(ALIVE)
            return it.recv(100).startswith(b"HTTP/1.1 200")
        return False


@dataclass
class Good:
    """A caller who asks again and again, each time on a new connection."""

    attacked: Attacked
    seconds: list[float] = field(default_factory=list)
    unanswered: int = 0
    memory: int = 0

    def __enter__(self) -> Good:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not (self._stop.wait(0.05) and self.seconds):
            start = time.monotonic()
            self.unanswered += not self.attacked.answers()
            self.seconds.append(time.monotonic() - start)
            self.memory = max(self.memory, self.attacked.memory())


@contextlib.contextmanager
def started(*certificate: Path) -> Iterator[Attacked]:
    port, *_ = free_ports()
    command = [
        sys.executable,
        "-m",
        "tests.helpers.fake_upstream",
        str(port),
        str(PATIENCE),
        *map(str, certificate),
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    attacked = Attacked(port, process, tls=bool(certificate))
    try:
        until(attacked.answers, 60)
        yield attacked
    finally:
        process.terminate()
        assert process.wait(40) == 0


@pytest.fixture(scope="module")
def over_http() -> Iterator[Attacked]:
    with started() as attacked:
        yield attacked


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    folder = tmp_path_factory.mktemp("tls")
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(folder / "chain.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    with started(folder / "chain.pem", folder / "key.pem") as attacked:
        yield attacked


@contextlib.contextmanager
def unharmed(attacked: Attacked) -> Iterator[None]:
    """Check that the attack in the block costs other callers no time, and the gateway no memory and
    no connections.
    """
    before = attacked.memory()
    files = attacked.open_files()
    with Good(attacked) as good:
        yield
    assert good.unanswered == 0
    assert max(good.seconds) < LATE
    assert good.memory - before < MOST
    until(lambda: attacked.open_files() <= files + 2, 20)
    assert attacked.answers()


def together(count: int, attack: Callable[[], None]) -> None:
    threads = [threading.Thread(target=attack) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rest(it: socket.socket) -> bytes:
    """All that still comes."""
    parts = []
    with contextlib.suppress(OSError):
        while part := it.recv(2**20):
            parts.append(part)
    return b"".join(parts)


def infer(text: str, more: str = "") -> bytes:
    value = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    body = json.dumps({"inputs": [value], "parameters": {"binary_data_output": True}}).encode()
    head = (
        f"POST {INFER.decode()} HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length:"
        f" {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def test_endless_trailers(over_http: Attacked) -> None:
    head = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
        % INFER
    )
    trailers = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(1000))

    def attack() -> None:
        with over_http.connect() as it:
            with pytest.raises(OSError):  # it is cut off long before
                it.sendall(head)
                for _ in range(20):
                    it.sendall(trailers)
            assert b"HTTP/1.1 200" not in rest(it)

    with unharmed(over_http):
        together(4, attack)


@pytest.mark.slow
def test_pipelining(over_http: Attacked) -> None:
    """On four connections at once: others get their answers between those."""
    count = 10_000

    def attack() -> None:
        with over_http.connect() as it:
            sending = threading.Thread(target=it.sendall, args=(ALIVE * count,))
            sending.start()
            found = 0
            end = b""
            while found < count and (part := it.recv(2**20)):
                joined = end + part
                found += joined.count(b"HTTP/1.1 200")
                end = joined[-11:]
                found -= end.count(b"HTTP/1.1 200")
            sending.join()
            assert found == count

    with unharmed(over_http):
        together(4, attack)


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.0", "HTTP/2.0, h2c"])
def test_an_upgrade_makes_no_request_of_a_body(over_http: Attacked, protocol: str) -> None:
    more = (
        f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {protocol}\r\nHTTP2-Settings:"
        " AAMAAABkAARAAAAA\r\n"
    )
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = (
        f"POST {INFER.decode()} HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length:"
        f" {len(smuggled)}\r\n\r\n"
    )
    with over_http.connect() as it:
        it.sendall(head.encode() + smuggled)
        first = it.recv(2**16)
        assert first.startswith(b"HTTP/1.1 400") and b"[invalid_argument]" in first
        it.sendall(infer("abc", more))
        assert it.recv(2**16).startswith(b"HTTP/1.1 200")
        it.sendall(ALIVE)
        assert it.recv(2**16).startswith(b"HTTP/1.1 200")
        it.settimeout(0.2)
        with pytest.raises(TimeoutError):
            it.recv(1)  # no answer that nobody asked for


@pytest.mark.parametrize("size", [33_000, 60_000])
def test_large_headers(over_http: Attacked, size: int) -> None:
    with over_http.connect() as it:
        it.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * size + b"\r\n\r\n")
        assert it.recv(100).startswith(b"HTTP/1.1 431")


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01\x02\x00"])
def test_silent_connections_over_tls(over_tls: Attacked, first: bytes) -> None:
    """1,200 of them, more than a process may usually have open, that never finish or never begin a
    handshake.
    """
    silent(over_tls, first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [b"", b"GET /v2 HT", b"POST %s HTTP/1.1\r\nContent-Length: 10\r\n" % INFER]
)
def test_silent_connections(over_http: Attacked, first: bytes) -> None:
    silent(over_http, first)


def silent(attacked: Attacked, first: bytes) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, files[1]), files[1]))
    try:
        with contextlib.ExitStack() as stack, unharmed(attacked):
            for _ in range(1200):
                it = stack.enter_context(
                    socket.create_connection(("127.0.0.1", attacked.port), timeout=30)
                )
                it.sendall(first)
            # The gateway ends them, not their callers.
            until(lambda: attacked.open_files() < 200, 20 * PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)


def test_trickled_headers(over_http: Attacked) -> None:
    with unharmed(over_http), over_http.connect() as it:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            it.sendall(b"GET /v2 HTTP/1.1\r\n")
            while time.monotonic() - start < 10 * PATIENCE:
                it.sendall(b"X: y\r\n")
                time.sleep(PATIENCE / 10)
        assert time.monotonic() - start < 5 * PATIENCE


@pytest.mark.slow
def test_trickled_bodies(over_http: Attacked) -> None:
    """Each has the time of a whole request."""
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" % INFER

    def attack() -> None:
        with over_http.connect() as it:
            it.sendall(head)
            start = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - start < 3 * PATIENCE:
                    it.sendall(b" ")
                    time.sleep(PATIENCE / 10)
            answer = rest(it)
            assert answer.startswith(b"HTTP/1.1 408") and b"[timed_out]" in answer

    with unharmed(over_http):
        together(20, attack)


@pytest.mark.slow
def test_answers_that_nobody_reads(over_http: Attacked) -> None:
    """20 of 16 MiB: they are given up, and their memory comes back."""
    before = over_http.memory()
    files = over_http.open_files()
    with contextlib.ExitStack() as stack, Good(over_http) as good:
        for _ in range(20):
            it = stack.enter_context(over_http.connect())
            it.sendall(infer("big"))
            with contextlib.suppress(ConnectionError):
                it.recv(1)  # its answer has begun
        until(lambda: over_http.open_files() <= files + 2, 60 * PATIENCE)
    assert good.unanswered == 0 and max(good.seconds) < LATE
    until(lambda: over_http.memory() - before < 2 * MOST, 60 * PATIENCE)
