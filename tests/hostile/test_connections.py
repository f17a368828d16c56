"""Attacks on the gateway's connections cost other callers no time, and the gateway no memory."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trustme

from radapter_serve.server.endpoints import free_ports
from tests.gateway.test_connections import answer, answers
from tests.gateway.test_gateway import ALIVE, BODY, HEAD
from tests.helpers.fake_upstream import until
from tests.hostile.harness import Caller, memory

PATIENCE = 1.0  # seconds that this gateway gives its callers, in place of 8 or 10
LATE = 3.0  # seconds for an answer to another caller
MOST = 48  # MiB that an attack may add to the memory of the gateway
BIG = b'{"parameters": {"binary_data_output": true}, %s' % BODY.replace(b"abc", b"big")[1:]


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
        return int(psutil.Process(self.process.pid).num_fds())

    def answers(self) -> bool:
        with contextlib.suppress(OSError), self.connect() as it:
            it.sendall(ALIVE)
            return it.recv(100).startswith(b"HTTP/1.1 200")
        return False


class OtherCaller(Caller):
    """Asks each time on a new connection, and sees how long the answer and how large the gateway
    is.
    """

    def __init__(self, attacked: Attacked) -> None:
        self._attacked = attacked
        self._seconds: list[float] = []
        self._unanswered = 0
        self.memory = 0

    def ask(self) -> None:
        start = time.monotonic()
        self._unanswered += not self._attacked.answers()
        self._seconds.append(time.monotonic() - start)
        self.memory = max(self.memory, self._attacked.memory())

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        assert self._unanswered == 0 and max(self._seconds) < LATE


@contextlib.contextmanager
def started(*certificate: Path) -> Iterator[Attacked]:
    port, *_ = free_ports()
    command = [sys.executable, "-m", "tests.helpers.fake_upstream", str(port), str(PATIENCE)]
    # By default glibc keeps large blocks that were freed, while a small one lies behind them. With
    # this the memory of the process is what the gateway holds.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    process = subprocess.Popen(
        [*command, *map(str, certificate)], cwd=Path(__file__).parents[2], env=environment
    )
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
    with OtherCaller(attacked) as other:
        yield
    assert other.memory - before < MOST
    until(lambda: attacked.open_files() <= files + 2, 20)
    assert attacked.answers()


def post(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


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

    with unharmed(over_http), ThreadPoolExecutor(4) as pool:
        for attacker in [pool.submit(attack) for _ in range(4)]:
            attacker.result()


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0", b"HTTP/2.0, h2c"])
def test_an_upgrade_makes_no_request_of_a_body(over_http: Attacked, protocol: bytes) -> None:
    more = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n" % protocol
    more += b"HTTP2-Settings: AAMAAABkAARAAAAA\r\n"
    with over_http.connect() as it:
        it.sendall(post(b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n", more))
        first = answer(it)
        assert first.startswith(b"HTTP/1.1 400") and b"[invalid_argument]" in first
        assert answers(it, post(BODY, more)) and answers(it)
        it.settimeout(0.2)
        with pytest.raises(TimeoutError):
            it.recv(1)  # no answer that nobody asked for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "first"),
    [
        *(("tls", first) for first in (b"", b"\x16\x03\x01\x02\x00")),
        *(("http", first) for first in (b"", b"GET /v2 HT", HEAD + b"Content-Length: 10\r\n")),
    ],
)
def test_silent_connections(over: str, first: bytes, request: pytest.FixtureRequest) -> None:
    """1,200 of them, more than a process may usually have open, that never finish or never begin a
    handshake or a request.
    """
    attacked: Attacked = request.getfixturevalue(f"over_{over}")
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


@pytest.mark.slow
def test_answers_that_nobody_reads(over_http: Attacked) -> None:
    """20 of 16 MiB: they are given up, and their memory comes back."""
    before = over_http.memory()
    files = over_http.open_files()
    with contextlib.ExitStack() as stack, OtherCaller(over_http):
        for _ in range(20):
            it = stack.enter_context(over_http.connect())
            it.sendall(post(BIG))
            with contextlib.suppress(ConnectionError):
                it.recv(1)  # its answer has begun
        until(lambda: over_http.open_files() <= files + 2, 60 * PATIENCE)
    until(lambda: over_http.memory() - before < MOST, 10 * PATIENCE)
