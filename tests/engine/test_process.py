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
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
import urllib3

from radapter_client import (
    Client,
    InvalidRequest,
    InvalidURL,
    ModelNotFound,
)
from radapter_serve.cli.release import main as release
from radapter_serve.cli.serve import main as serve
from radapter_serve.encoders.loaded import load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.index.build import build
from radapter_serve.release.repository import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.engine_server import EngineServer
from radapter_serve.server.releases import find_server
from tests.helpers.fake_upstream import until
from tests.helpers.indexes import outdated_at
from tests.helpers.shared import shared
from tests.helpers.small_release import png, seal
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


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def test_answers_are_those_of_the_engine(two_releases: Path, photos: Path, tmp_path: Path) -> None:
    build(str(photos), tmp_path / "indexes" / "photos", load_release(two_releases, 2))
    with (
        in_process(two_releases, tmp_path / "indexes") as one,
        Client(one.url) as client,
        Engine.open(two_releases, indexes=tmp_path / "indexes") as engine,
        Client(transport=engine) as here,
    ):
        images = [png(5), png(6, kind="JPEG")]
        np.testing.assert_array_equal(client.embed_images(images), here.embed_images(images))
        assert client.embed_texts(["a cat"]).tolist() == here.embed_texts(["a cat"]).tolist()
        assert client.classify(images, ["red", "green"]) == here.classify(images, ["red", "green"])
        masks = [each.segment(png(7), ["sky", "sea"]) for each in (client, here)]
        np.testing.assert_array_equal(masks[0].mask, masks[1].mask)
        assert client.search("a cat", index="photos") == here.search("a cat", index="photos")
        assert client.release() == here.release() and client.is_ready()
        with pytest.raises(InvalidRequest, match="label 1 of 1 is empty"):
            client.classify(images, [" "])
        message = f"answers HTTP and no gRPC.*write {one.url}$"
        grpc = Client(one.url.replace("http", "grpc"))
        with grpc, pytest.raises(InvalidURL, match=message):
            grpc.embed_texts(["a"])
        with pytest.raises(ModelNotFound, match="no release 1 of embed_text here; there are 2"):
            Client(one.url, release=1).embed_texts(["a"])
        body = {"input": "a cat", "model": "radapter"}
        answer = urllib3.request("POST", f"{one.url}/v1/embeddings", json=body)
        embedding = answer.json()["data"][0]["embedding"]
        np.testing.assert_allclose(embedding, client.embed_texts(["a cat"])[0], atol=1e-6)
        metrics = urllib3.request("GET", f"{one.url}/metrics").data
        assert b'radapter_gateway_requests_total{code="ok",task="classify"}' in metrics


def test_a_switch_fails_nobody_and_mixes_nothing(copy: Path, tmp_path: Path) -> None:
    """Callers without a pause, while the releases change places: every answer is one of the two."""
    expected = {}
    for number in (1, 2):
        with Engine.open(f"{copy}@{number}") as engine:
            texts = [f"text {one}" for one in range(3)]
            expected[number] = Client(transport=engine).embed_texts(texts)
    with in_process(copy, tmp_path) as one:
        stop = threading.Event()
        seen: list[int] = []
        releases: set[int] = set()
        wrong: list[Any] = []

        def ask() -> None:
            with Client(one.url, retries=0) as client:
                while not stop.is_set():
                    try:
                        found = client.embed_texts(texts)
                    except Exception as error:
                        wrong.append(error)
                        return
                    fits = [n for n, values in expected.items() if np.allclose(found, values)]
                    seen.extend(fits)
                    if not fits:
                        wrong.append(found)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in (1, 2, 1):
            said: list[str] = []
            assert one.server.load([number], said.append) == f"release {number} is served"
            assert any("comparing image_encoder" in line for line in said)
            seen.clear()
            until(lambda: len(seen) >= 10)
            releases |= set(seen)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not wrong
        assert releases == {1, 2}
        assert Served.load(copy).releases == (1,)
        assert one.server.rollback(lambda line: None) == "release 2 is served"


def test_radapter_release_finds_it(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_process(copy, tmp_path) as one:
        assert find_server(copy) == one.folder
        assert release(["load", "1", "--model-repository", str(copy)]) == 0
        assert "release 1 is served" in capsys.readouterr().out
        assert release(["list", "--model-repository", str(copy)]) == 0
        assert one.url in capsys.readouterr().out
        (copy / "text_encoder" / "2" / "model.onnx").write_bytes(b"broken")
        seal(copy, 2)
        assert release(["load", "2", "--model-repository", str(copy)]) == 2
        message = capsys.readouterr().err
        assert "release 2 was not loaded, and release 1 is served as before" in message
        with Client(one.url) as client:
            assert client.release().version == 1
    assert find_server(copy) is None and not one.folder.exists()


def test_an_index_is_searched_while_its_release_is_served(
    copy: Path, photos: Path, tmp_path: Path
) -> None:
    indexes = tmp_path / "indexes"
    build(str(photos), indexes / "photos", load_release(copy, 1))
    with in_process(copy, indexes) as one, Client(one.url) as client:
        assert outdated_at(f"{one.url}/metrics") == {"photos": 1}
        with pytest.raises(InvalidRequest, match="of another release"):
            client.search("a cat", index="photos")
        one.server.load([1, 2])
        hits = client.search("a cat", index="photos")
        with Engine.open(f"{copy}@1", indexes=indexes) as engine:
            assert hits == Client(transport=engine).search("a cat", index="photos")
        build(str(photos), indexes / "photos", load_release(copy, 2), resume=False)
        one.server.load([2])
        assert outdated_at(f"{one.url}/metrics") == {"photos": 0}
        assert len(client.search("a cat", index="photos")) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            ([flag, "9"], f"{flag} has no effect with --engine process")
            for flag in ("--instances", "--gateway-port", "--gateway-host")
        ),
        (["--timeout", "9", "--drain-seconds", "9"], "--timeout, --drain-seconds has no effect"),
        (["--host", "0.0.0.0"], "or add --api-keys KEYS to --engine process"),
        (["--model-repository", "nowhere"], "nowhere does not exist"),
    ],
)
def test_flags_that_can_not_be(
    two_releases: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    port = str(free_ports()[0])
    models = [] if "--model-repository" in flags else [str(two_releases)]
    assert serve([*models, "--engine", "process", "--http-port", port, *flags]) == 2
    assert message in capsys.readouterr().err


def until_ready(process: subprocess.Popen[str], port: int, trusting: ssl.SSLContext) -> None:
    """Wait until a server answers that all its tasks work."""
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
        until_ready(process, port, trusting)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            other = str(taken.getsockname()[1])
            assert serve([str(two_releases), "--engine", "process", "--http-port", other]) == 2
        folder = find_server(two_releases)
        assert folder is not None
        os.kill(process.pid, signal.SIGKILL)  # nothing of it keeps the next one away
        process.communicate(timeout=60)
        assert find_server(two_releases) is None
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until_ready(process, port, trusting)
        assert not folder.exists()
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"HTTP     https://127.0.0.1:{port}" in out and "Traceback" not in err


@pytest.mark.parametrize(("runtime", "checked"), [(None, "comparing"), ("openvino", "checking")])
def test_a_release_is_compared_with_torch_once(
    two_releases: Path, tmp_path: Path, runtime: str | None, checked: str
) -> None:
    said: list[str] = []
    config = ServerConfig(
        two_releases, Endpoints.on_free_ports(), indexes=tmp_path, runtime=runtime
    )
    server = EngineServer(config)
    try:
        server.start(said.append)
    finally:
        server.stop()
    found = [line for line in said if "text_encoder" in line and "digest" not in line]
    assert len(found) == 1 and found[0].startswith(checked), said


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
