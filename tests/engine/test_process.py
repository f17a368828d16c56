"""`radapter-serve --engine process`: the gateway's app in front of an engine, in one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trustme
import urllib3

from radapter_client import Client, ServerUnavailable
from radapter_serve.cli.serve import main as serve
from radapter_serve.server.config import free_ports
from radapter_serve.server.releases import find_server
from tests.helpers.fake_upstream import until
from tests.helpers.gateway import until_asked
from tests.helpers.small_release import png
from tests.helpers.ways import in_process


@pytest.fixture
def copy(releases: Path, tmp_path: Path) -> Path:
    """A copy of the two releases, whose server no other test's is."""
    return shutil.copytree(releases, tmp_path / "models")


def test_every_way_in(releases: Path, tmp_path: Path) -> None:
    """tests/server/test_releases_served.py shows that the answers are right."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "index.json").touch()
    with in_process(releases, tmp_path) as running, Client(running.url) as client:
        assert client.indexes() == ["photos"] and client.is_ready()
        grpc = Client(running.url.replace("http", "grpc"), retries=0)
        with (
            grpc,
            pytest.raises(ServerUnavailable, match="--engine process.* answers only http://"),
        ):
            grpc.embed_texts(["a"])
        body = {"input": "a cat", "model": "radapter"}
        answer = urllib3.request("POST", f"{running.url}/v1/embeddings", json=body)
        embedding = answer.json()["data"][0]["embedding"]
        np.testing.assert_allclose(embedding, client.embed_texts(["a cat"])[0], atol=1e-6)


def test_flags_that_can_not_be(
    releases: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    models = str(releases)
    for flags, message in (
        ([models, "--gateway-port", "9"], "--gateway-port has no effect with --engine process"),
        ([models, "--timeout", "9", "--drain-seconds", "9"], "--timeout, --drain-seconds has no"),
        ([models, "--host", "0.0.0.0"], "make one with: radapter-gateway --api-keys FILE"),
        ([str(tmp_path / "nowhere")], "nowhere does not exist"),
    ):
        assert serve([*flags, "--engine", "process", "--http-port", str(free_ports()[0])]) == 2
        assert message in capsys.readouterr().err


def test_the_command_starts_says_where_and_stops(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_ports()[0]
    flags = [str(copy), "--engine", "process", "--indexes", str(tmp_path)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve([*flags, "--http-port", str(taken.getsockname()[1])]) == 2
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "chain.pem")
    flags += ["--tls-certificate", str(tmp_path / "chain.pem")]
    flags += ["--tls-key", str(tmp_path / "chain.pem"), "--http-port", str(port)]
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    folders: list[Path | None] = []

    def is_ready() -> bool:
        path = f"https://localhost:{port}/health/ready"
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(path, timeout=10, context=trusting) as answer,
        ):
            return answer.status == 200
        return False

    def ask() -> None:
        until(is_ready, 60)
        folders.append(find_server(copy))

    assert until_asked(partial(serve, flags), ask) == 0
    [folder] = folders
    assert folder is not None and not folder.exists() and find_server(copy) is None
    assert f"HTTP     https://127.0.0.1:{port}" in capsys.readouterr().out


@pytest.mark.slow
def test_without_what_windows_lacks(copy: Path, tmp_path: Path) -> None:
    """It serves, `radapter-release` finds it, and it stops in order."""
    port = free_ports()[0]
    command = [sys.executable, "-m", "tests.helpers.no_unix"]
    where = {"cwd": Path(__file__).parents[2], "env": {**os.environ, "TMPDIR": str(tmp_path)}}
    flags = ["--engine", "process", "--http-port", str(port), "--indexes", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "serve", str(copy), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **where,  # type: ignore[call-overload]
    )
    try:
        until(lambda: list(tmp_path.glob("radapter-serve-*/release-*")), 60)
        load = subprocess.run(
            [*command, "release", "load", "1", "--model-repository", str(copy)],
            capture_output=True,
            text=True,
            check=False,
            **where,  # type: ignore[call-overload]
        )
        assert load.returncode == 0 and "release 1 is served" in load.stdout.splitlines()
        with Client(f"http://127.0.0.1:{port}") as client:
            assert client.classify(png(0), ["a"]).release == 1
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in err, err
    assert "stopping" in err
    assert not list(tmp_path.glob("radapter-serve-*"))
