"""radapter-gateway: its settings, its keys, and the process that it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import urllib3

from radapter_serve.cli import gateway, serve
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.access import Keys
from radapter_serve.gateway.run import (
    MAX_SILENCE_SECONDS,
    MAX_START_SECONDS,
    Child,
)
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.endpoints import free_ports
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_upstream import until


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 lets others in, and there are no keys; make one"),
        ({"host": "no.such.host.invalid"}, "--host 'no.such.host.invalid'"),
        ({"port": 70000}, "--port is 70000"),
        ({"max_body": 0}, "--max-body is 0"),
        ({"timeout": float("inf")}, "--timeout is inf"),
        ({"max_queue": -1}, "--max-queue is -1; allowed are 0 and more"),
        ({"max_connections_per_address": 0}, "--max-connections-per-address is 0; allowed are 1"),
        ({"max_memory": 1.0}, "--max-memory 1 holds no body of --max-body 64 MiB"),
        ({"tls_key": Path("key.pem")}, "--tls-certificate and --tls-key go together"),
        ({"api_keys": Path("keys"), "no_api_keys": True}, "--api-keys FILE or --no-api-keys, not"),
    ],
)
def test_settings_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RAdapterError, match=re.escape(message)):
        Settings(**options).check()
    assert Settings(host="localhost").check() == "127.0.0.1"
    for others in ({"no_api_keys": True}, {"api_keys": Path("keys")}):
        assert Settings(host="0.0.0.0", **others).check() == "0.0.0.0"


def test_a_new_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    new = ["--api-keys", str(file), "--new-key"]
    assert gateway.main([*new, "ann"]) == 0
    first = capsys.readouterr().out.strip()
    assert file.read_text() == f"ann: {hashlib.sha256(first.encode()).hexdigest()}\n"
    assert len(first) > 40 and file.stat().st_mode & 0o777 == 0o600
    file.write_text(file.read_text().rstrip())
    assert gateway.main([*new, "bob"]) == 0
    second = capsys.readouterr().out.strip()
    assert first != second
    for key in (first, second):
        Keys(file).check(f"Bearer {key}")
    for arguments, message in (
        ([*new, "bob"], "has a key bob already"),
        ([*new, "a: b"], "a name has 1 to 64 letters"),
        (["--new-key", "ann"], "--api-keys FILE"),
    ):
        assert gateway.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == 2


def test_certificates_keys_and_ports_that_do_not_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = str(tmp_path / "none.pem")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for arguments, message in (
        (["--tls-certificate", none, "--tls-key", none], "give two PEM files that belong together"),
        (["--tls-certificate", str(nonsense), "--tls-key", str(nonsense)], "give two PEM files"),
        (["--host", "192.0.2.1", "--no-api-keys"], "cannot listen on 192.0.2.1 port 0"),
        (["--api-keys", str(nonsense)], str(nonsense)),
    ):
        assert gateway.main([*arguments, "--port", "0"]) == 2
        assert message in capsys.readouterr().err


def test_a_gateway_that_never_says_that_it_lives_is_killed() -> None:
    started: list[int] = []

    def sleeping(_: Settings, pulse: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "60"], pass_fds=[pulse])
        started.append(process.pid)
        return process

    clock = FakeClock()
    with Child(Settings(), clock, sleeping) as child:
        clock.now += MAX_START_SECONDS - 1
        assert child.died() is None
        clock.now += 1
        assert child.died() == "its event loop no longer answered, so it was killed"
        assert child.died() == "it was killed by SIGKILL"
        child.start()
        assert child.died() is None
        os.kill(started[-1], signal.SIGSTOP)
        os.waitpid(started[-1], os.WUNTRACED)  # until it has stopped
        assert child.died() == "a signal had stopped it, so it was killed"
        assert child.died() == "it was killed by SIGKILL"


def beats(child: Child, seconds: float) -> bool:
    """Whether a gateway gives a sign of life within some seconds."""
    assert child._pulse is not None
    return bool(select.select([child._pulse], [], [], seconds)[0])


def test_a_gateway_whose_event_loop_hangs_is_killed() -> None:
    code = (
        "import asyncio, sys, time; from tests.helpers.fake_upstream import *\n"
        "run.PULSE_SECONDS = 0.1\n"
        "def connect():\n"
        "    asyncio.get_running_loop().call_later(0.3, time.sleep, 60)\n"
        "    return FakeUpstream()\n"
        "settings = Settings(port=0)\n"
        "listener = run.listen(settings)\n"
        "run.GatewayServer(settings, listener, connect, pulse=int(sys.argv[1])).run()"
    )

    def hanging(_: Settings, pulse: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(pulse)]
        return subprocess.Popen(command, pass_fds=[pulse], cwd=Path(__file__).parents[2])

    clock = FakeClock()
    with Child(Settings(), clock, hanging) as child:
        assert beats(child, 60)
        while beats(child, 0.8):  # until its last sign
            assert child.died() is None
        clock.now += MAX_SILENCE_SECONDS - 1
        assert child.died() is None
        clock.now += 1
        assert child.died() == "its event loop no longer answered, so it was killed"


def test_a_gateway_without_triton_and_without_a_free_place_lives_on_and_stops_in_order() -> None:
    port, nobody, _ = free_ports()
    clock = FakeClock()
    places: dict[str, Any] = {"max_connections": 3, "max_connections_per_address": 3}
    settings = Settings(port=port, server=f"127.0.0.1:{nobody}", **places)
    head = (
        b"POST /v2/models/classify/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    )
    with Child(settings, clock) as child:
        assert beats(child, 60) and child.died() is None
        url = f"http://127.0.0.1:{port}"
        for path, status in (("/health/live", 200), ("/health/ready", 503)):
            answer = urllib3.request("GET", url + path, retries=5)
            assert answer.status == status
        assert b"[server_unavailable]" in answer.data
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # the last of them waits for a place
                stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
                stranger.sendall(head)  # and no body
            stranger.settimeout(0.3)
            with pytest.raises(TimeoutError):
                stranger.recv(1)
            for _ in range(2):
                clock.now += MAX_SILENCE_SECONDS - 1
                assert beats(child, 30) and child.died() is None
    assert child._process.returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api-keys", "keys"], "--api-keys needs a gateway: --gateway-port PORT"),
        (["--gateway-port", "70000"], "--gateway-port is 70000; allowed are 1 to 65535"),
        (["--gateway-port", "0", "--gateway-host", "::"], "--gateway-host :: lets others in"),
        (["--gateway-port", "0", "--tls-key", "k"], "--tls-certificate and --tls-key go together"),
        (["--gateway-port", "TAKEN"], "Address already in use; choose another with --gateway-port"),
    ],
)
def test_a_gateway_that_could_not_start_is_refused_before_the_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = [flag.replace("TAKEN", port) for flag in flags]
        assert serve.main([str(tmp_path), "--engine", "triton", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_gateway_ends_with_its_parent() -> None:
    port, nobody, _ = free_ports()
    code = (
        "from radapter_serve.gateway.run import start\n"
        "from radapter_serve.gateway.settings import Settings\n"
        f"settings = Settings(port={port}, server='127.0.0.1:{nobody}')\n"
        "print(start(settings).pid, flush=True); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().decode().strip())
        assert child.exists()
        parent.kill()
    until(lambda: not child.exists() or "State:\tZ" in (child / "status").read_text(), 60)
