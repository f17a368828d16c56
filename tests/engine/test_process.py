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
from pathlib import Path

import numpy as np
import pytest
import trustme
import urllib3

from radapter_client import Client, ModelNotFound, ServerUnavailable
from radapter_serve.cli.serve import main as serve
from radapter_serve.encoders.loaded import load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.index.build import build
from radapter_serve.release.repository import Served
from radapter_serve.server.endpoints import free_ports
from radapter_serve.server.releases import find_server
from tests.helpers.fake_upstream import until
from tests.helpers.shared import shared
from tests.helpers.small_release import photos_in, png
from tests.helpers.ways import in_process


@pytest.fixture(scope="session")
def two_releases(common: Path, repository: Path) -> Path:
    """A repository that serves the second of two releases."""

    def make(folder: Path) -> None:
        shutil.copytree(repository, folder, dirs_exist_ok=True)
        Served((2,)).save(folder)

    return shared(common, "two-releases", make)


@pytest.fixture
def copy(two_releases: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_releases, tmp_path / "models")


def test_answers_are_those_of_the_engine(two_releases: Path, tmp_path: Path) -> None:
    photos = photos_in(tmp_path / "photos")
    build(photos, tmp_path / "indexes" / "photos", load_release(two_releases, 2))
    with (
        in_process(two_releases, tmp_path / "indexes") as one,
        Client(one.url) as client,
        Engine.open(two_releases, indexes=tmp_path / "indexes") as engine,
        Client(transport=engine) as here,
    ):
        images = [png(5), png(6, kind="JPEG")]
        np.testing.assert_array_equal(client.embed_images(images), here.embed_images(images))
        assert client.classify(images, ["red", "green"]) == here.classify(images, ["red", "green"])
        assert client.search("a cat", index="photos") == here.search("a cat", index="photos")
        assert client.indexes() == here.indexes() == ["photos"]
        assert client.release() == here.release() and client.is_ready()
        grpc = Client(one.url.replace("http", "grpc"), retries=0)
        with grpc, pytest.raises(ServerUnavailable, match="--engine process.* answers http://"):
            grpc.embed_texts(["a"])
        with pytest.raises(ModelNotFound, match="no release 1 of embed_text here; there are 2"):
            Client(one.url, release=1).embed_texts(["a"])
        body = {"input": "a cat", "model": "radapter"}
        answer = urllib3.request("POST", f"{one.url}/v1/embeddings", json=body)
        embedding = answer.json()["data"][0]["embedding"]
        np.testing.assert_allclose(embedding, client.embed_texts(["a cat"])[0], atol=1e-6)


def test_flags_that_can_not_be(
    two_releases: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    models = str(two_releases)
    for flags, message in (
        ([models, "--gateway-port", "9"], "--gateway-port has no effect with --engine process"),
        ([models, "--timeout", "9", "--drain-seconds", "9"], "--timeout, --drain-seconds has no"),
        ([models, "--host", "0.0.0.0"], "or add --api-keys KEYS to --engine process"),
        ([str(tmp_path / "nowhere")], "nowhere does not exist"),
    ):
        assert serve([*flags, "--engine", "process", "--http-port", str(free_ports()[0])]) == 2
        assert message in capsys.readouterr().err


def test_the_command_starts_says_where_and_stops(two_releases: Path, tmp_path: Path) -> None:
    port = free_ports()[0]
    command = [sys.executable, "-m", "radapter_serve.cli.serve", str(two_releases)]
    command += ["--engine", "process", "--http-port", str(port), "--indexes", str(tmp_path)]
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "chain.pem")
    command += ["--tls-certificate", str(tmp_path / "chain.pem")]
    command += ["--tls-key", str(tmp_path / "chain.pem")]
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        path = f"https://localhost:{port}/health/ready"

        def is_ready() -> bool:
            assert process.poll() is None
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(path, timeout=10, context=trusting) as answer,
            ):
                return answer.status == 200
            return False

        until(is_ready, 60)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            other = str(taken.getsockname()[1])
            assert serve([str(two_releases), "--engine", "process", "--http-port", other]) == 2
        folder = find_server(two_releases)
        assert folder is not None
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert find_server(two_releases) is None and not folder.exists()
    assert f"HTTP     https://127.0.0.1:{port}" in out and "Traceback" not in err


@pytest.mark.slow
def test_without_what_windows_lacks(copy: Path, tmp_path: Path) -> None:
    """It serves, `radapter-release` finds it and needs its secret, and it stops in order."""
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
        [found] = tmp_path.glob("radapter-serve-*/release-*")
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
        _, number, _ = found.name.split("-")
        with socket.create_connection(("127.0.0.1", int(number)), 10) as stranger:
            stranger.sendall(b'{"do": "load", "releases": [2], "secret": ""}\n')
            assert b"error" in stranger.makefile("rb").readline()
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in err, err
    assert "stopping" in err
    assert not list(tmp_path.glob("radapter-serve-*"))
