"""Attacks on the gateway's connections cost other callers no time, and the gateway no memory."""

from __future__ import annotations

import contextlib
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

from radapter_serve.server.config import free_ports
from tests.gateway.test_gateway import ALIVE, BODY, HEAD
from tests.helpers.asking import meanwhile
from tests.helpers.fake_upstream import serving, until
from tests.hostile.test_hostile import memory

PATIENCE = 1.0  # seconds that this gateway gives its callers, in place of 8 or 10
LATE = 10.0  # seconds for an answer to another caller, who gives up after 30
MOST = 48  # MiB that an attack may add to the memory of the gateway
BIG = b'{"parameters": {"binary_data_output": true}, %s' % BODY.replace(b"abc", b"big")[1:]


LAST = ALIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


def post(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def all_of(it: socket.socket) -> bytes:
    """What comes until the other side ends the connection."""
    return b"".join(iter(lambda: it.recv(2**20), b""))


def test_an_upgrade_makes_no_request_of_a_body() -> None:
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving() as served:
        for protocol in (b"h2c", b"websocket", b"TLS/1.0", b"HTTP/2.0, h2c"):
            more = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n" % protocol
            more += b"HTTP2-Settings: AAMAAABkAARAAAAA\r\n"
            with served.connection(post(smuggled, more) + post(BODY, more) + LAST) as it:
                received = all_of(it)
            statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")]
            assert statuses == [b"", b"400", b"200", b"200"], protocol


@dataclass
class Attacked:
    """A gateway in a process of its own."""

    port: int
    process: psutil.Process
    tls: bool

    def connect(self) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        if not self.tls:
            return plain
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(plain)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), self.connect() as it:
            it.sendall(ALIVE)
            return it.recv(100).startswith(b"HTTP/1.1 200")
        return False


@pytest.fixture(scope="module")
def attacked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Attacked]:
    command = [sys.executable, "-m", "tests.helpers.fake_upstream"]
    port = free_ports()[0]
    arguments: list[object] = [port, PATIENCE]
    if request.param == "tls":
        chain = tmp_path_factory.mktemp("tls") / "chain.pem"
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(chain)
        arguments += [chain, chain]
    process = subprocess.Popen([*command, *map(str, arguments)], cwd=Path(__file__).parents[2])
    attacked = Attacked(port, psutil.Process(process.pid), request.param == "tls")
    try:
        until(attacked.answers, 60)
        yield attacked
    finally:
        process.terminate()
        assert process.wait(40) == 0


@contextlib.contextmanager
def unharmed(
    attacked: Attacked, most: int = MOST, ended: float = 20 * PATIENCE, part: float | None = None
) -> Iterator[None]:
    """Check that the attack in the block costs other callers no time, and the gateway no memory and
    no connections but while it lasts: `most` MiB then, and connections for `ended` seconds. No
    other caller waits for `LATE` seconds or, if given, for this `part` of the attack, which takes
    longer where the machine has other work.
    """
    before = memory(attacked.process.pid)
    files = attacked.process.num_fds()
    waits: list[float] = []

    def ask() -> None:
        start = time.monotonic()
        assert attacked.answers()
        waits.append(time.monotonic() - start)
        assert memory(attacked.process.pid) - before < most

    began = time.monotonic()
    with meanwhile(ask):
        yield
        until(lambda: attacked.process.num_fds() <= files + 2, ended)
    seconds = time.monotonic() - began
    assert max(waits) < (LATE if part is None else part * seconds)
    until(lambda: memory(attacked.process.pid) - before < MOST, 10 * PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("attacked", ["http"], indirect=True)
def test_pipelining(attacked: Attacked) -> None:
    """Four connections do it at once: others get their answers between those."""

    def attack() -> None:
        with attacked.connect() as it:
            sending = threading.Thread(target=it.sendall, args=(ALIVE * 10_000 + LAST,))
            sending.start()
            assert all_of(it).count(b"HTTP/1.1 200") == 10_001
            sending.join()

    with unharmed(attacked, part=1 / 4), ThreadPoolExecutor(4) as pool:
        for attacker in [pool.submit(attack) for _ in range(4)]:
            attacker.result()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attacked", "first"),
    [
        *(("tls", first) for first in (b"", b"\x16\x03\x01\x02\x00")),
        *(("http", first) for first in (b"", b"GET /v2 HT", HEAD + b"Content-Length: 10\r\n")),
    ],
    indirect=["attacked"],
)
def test_silent_connections(attacked: Attacked, first: bytes) -> None:
    """1,200 of them, more than a process may usually have open, that never finish or never begin a
    handshake or a request; the gateway ends them, not their callers.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, files[1]), files[1]))
    try:
        with contextlib.ExitStack() as stack, unharmed(attacked):
            for _ in range(1200):
                address = ("127.0.0.1", attacked.port)
                it = stack.enter_context(socket.create_connection(address, timeout=30))
                it.sendall(first)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)


@pytest.mark.slow
@pytest.mark.parametrize("attacked", ["http"], indirect=True)
def test_answers_that_nobody_reads(attacked: Attacked) -> None:
    """20 of 15 MiB: they are given up, and their memory comes back."""
    with contextlib.ExitStack() as stack, unharmed(attacked, 1024, 60 * PATIENCE):
        for _ in range(20):
            it = stack.enter_context(attacked.connect())
            it.sendall(post(BIG))
            with contextlib.suppress(ConnectionError):
                it.recv(1)  # its answer has begun
