"""radapter-gateway: its settings, its keys, and the process that it is."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import urllib3

from radapter_serve.cli import gateway, serve
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.access import Keys
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.endpoints import free_ports
from tests.gateway.test_gateway import HEAD
from tests.helpers.fake_upstream import until
from tests.helpers.gateway import start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 lets others in, and there are no keys; make one"),
        ({"host": "no.such.host.invalid"}, "--host 'no.such.host.invalid'"),
        ({"port": 70000}, "port is 70000"),
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


def test_a_gateway_without_triton_and_without_a_free_place_lives_on_and_stops_in_order() -> None:
    port, nobody, _ = free_ports()
    settings = Settings(port=port, server=f"127.0.0.1:{nobody}", max_connections=3)
    process = start(replace(settings, max_connections_per_address=3))
    url = f"http://127.0.0.1:{port}"

    def answers(path: str) -> int | None:
        assert process.poll() is None
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return urllib3.request("GET", url + path, retries=False, timeout=20).status
        return None

    until(lambda: answers("/health/live") == 200, 60)
    assert answers("/health/ready") == 503
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # the last of them waits for a place
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            stranger.sendall(HEAD + b"Content-Length: 9\r\n\r\n")  # and no body
        stranger.settimeout(0.3)
        with pytest.raises(TimeoutError):
            stranger.recv(1)
    until(lambda: answers("/health/live") == 200)
    process.terminate()
    assert process.wait(40) == 0


def test_a_gateway_that_could_not_start_is_refused_before_the_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, message in (
            (["--api-keys", "keys"], "--api-keys needs a gateway: --gateway-port PORT"),
            (["--gateway-port", "0", "--gateway-host", "::"], "host :: lets others in"),
            (["--gateway-port", str(taken.getsockname()[1])], "Address already in use"),
        ):
            assert serve.main([str(tmp_path), "--engine", "triton", *flags]) == 2
            assert message in capsys.readouterr().err
