"""The tasks on a real tritonserver; tests/engine/test_as_served.py compares all answers."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from tritonclient.utils import InferenceServerException

from radapter_client import Client, InvalidRequest, ModelNotFound
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.server.config import Endpoints, ServerConfig, free_ports
from radapter_serve.server.launch import shm_prefix
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.tasks.classify import ClassifyRequest, classify
from radapter_serve.tasks.embed import Labels
from tests.helpers.asking import connect, tensor, tensors, tritonserver
from tests.helpers.small_release import png

pytestmark = pytest.mark.triton
CATS = ["cat, kitty", "dog", "bird"]


# Answers


@pytest.mark.parametrize("model", ["text_encoder", "patch_encoder"])
def test_callers_who_give_up_do_not_hold_up_the_others(server, client, model):
    def encoded() -> int:
        models = client.get_inference_statistics(model).model_stats
        return sum(model.inference_count for model in models)

    if model == "text_encoder":
        labels = [[f"nobody's label {index}".encode() for index in range(20_000)]]
        calls = [("classify", tensors(image=[[png(0)]], labels=labels))]
        most = 20_000
    else:  # 484 windows each
        sizes = {"short_side": 300, "stride": 14}
        calls = [("segment", tensors(image=png(0, 64, 64), labels=CATS, **sizes))] * 40
        most = 484 * 40
    before = encoded()
    started = [client.async_infer(*call, callback=lambda result, error: None) for call in calls]
    while encoded() == before:
        time.sleep(0.001)
    for call in started:
        call.cancel()
    with Client(server.grpc_url, retries=0) as asking:
        asking.classify(png(0), ["cat"])
        asking.segment(png(0), CATS)
    assert encoded() - before < most


def test_a_request_may_say_how_long_its_caller_waits(client):
    """The parameter `timeout` of KServe, in microseconds, reaches the process of a task."""
    inputs = [tensor("image", [[png(0)]])]
    assert client.infer("embed_image", inputs, timeout=60_000_000)
    with pytest.raises(InferenceServerException, match=r"\[timed_out\] .* more than 1e-06 s"):
        client.infer("embed_image", inputs, timeout=1)


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_the_client_finds_the_releases_that_are_served(server, way):
    url = server.grpc_url if way == "grpc" else server.http_url
    with Client(url) as client:
        assert (client.release().version, client.release().embed_dim) == (2, 8)
        assert [release.version for release in client.releases()] == [1, 2]
        with pytest.raises(InvalidRequest, match="this server does not list its indexes") as caught:
            client.indexes()
        assert caught.value.code is None
    with Client(url, release=1) as pinned:
        assert pinned.is_ready() and pinned.release().version == 1
        assert {answer.release for answer in pinned.classify([png(0, 4, 4)] * 40, CATS)} == {1}
    with Client(url, release=7) as absent:
        assert not absent.is_ready()
        with pytest.raises(ModelNotFound, match="release 7; it serves 1, 2"):
            absent.release()
        with pytest.raises(ModelNotFound, match="version 7 is not found"):
            absent.embed_texts(["x"])


# α


LABELS = ["cat", "a dog in the SNOW", "don't know", "猫"]


def test_a_release_of_any_alpha_answers_as_those_with_it_folded_in(
    dynamic_tiny_clip: Path, exported_tiny_clip: Path
) -> None:
    images = [png(number, 33, 33) for number in range(4)]
    texts = ["a cat", "two dogs"]
    folded = exported_tiny_clip / "model_repository"
    fixed = {alpha: load_release(f"{folded}@{version}") for alpha, version in ((0.3, 1), (0.8, 2))}

    def call(image: bytes, alpha: float, labels: Labels) -> None:
        [expected] = complete(classify(fixed[alpha], ClassifyRequest([image], labels)))
        answer = client.classify(image, labels.names, label_set=labels.label_set, alpha=alpha)
        assert answer.labels == expected.labels
        assert answer.scores == pytest.approx(expected.scores.tolist(), rel=1e-3)

    with tritonserver(dynamic_tiny_clip) as server, Client(server.grpc_url, batch_size=3) as client:
        assert (client.release().alpha, client.release().dynamic_alpha) == (0.5, True)
        for alpha, release in fixed.items():
            pixels = release.embed_pixels([release.pixels(image) for image in images])
            np.testing.assert_allclose(client.embed_images(images, alpha=alpha), pixels, atol=1e-5)
            rows = client.embed_texts(texts, alpha=alpha)
            np.testing.assert_allclose(rows, release.embed_texts(texts), atol=1e-5)
        embeds = client.embed_texts(texts)
        np.testing.assert_array_equal(embeds, client.embed_texts(texts, alpha=0.5))
        assert np.abs(embeds - client.embed_texts(texts, alpha=0)).max() > 1e-3
        jobs = itertools.product(images, fixed, [Labels(label_set="four"), Labels(LABELS)])
        with ThreadPoolExecutor(8) as pool:  # many α at once
            list(pool.map(lambda job: call(*job), [*jobs] * 2))


# The server


def one_release(repository: Path, folder: Path) -> Path:
    for name in ("image_encoder", "embed_image"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("1"))
    # The other tasks read embed_text's tokenizer.
    tokenizer = Path("embed_text", "2", "tokenizer.json")
    (folder / tokenizer).parent.mkdir(parents=True)
    shutil.copy(repository / tokenizer, folder / tokenizer)
    return folder


def test_only_what_is_a_model_is_served_and_the_secret_opens_the_doors(repository, tmp_path):
    """tests/server/test_closed.py shows that nobody else opens them."""
    folder = one_release(repository, tmp_path / "repository")
    for name in (".export-x", "notes"):
        (folder / name / "1").mkdir(parents=True)
    (folder / "README.md").touch()
    endpoints = Endpoints("::1", *free_ports())
    with TritonServer(ServerConfig(folder, endpoints)) as server, connect(server) as client:
        assert list(server.models) == ["embed_image", "image_encoder"]
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
        assert "--http-restricted-api" in arguments and server._secret not in arguments
        assert server.control.serving() == {"embed_image": [2], "image_encoder": [2]}
        server.control.unload("embed_image")
        assert not client.is_model_ready("embed_image")
        with pytest.raises(RAdapterError, match="failed to load 'nothing'"):
            server.control.load("nothing")
        server.control.load("embed_image")
        inputs = [tensor("image", [[png(0)]])]
        assert client.infer("embed_image", inputs).as_numpy("image_embeds").shape == (1, 8)
        with urllib.request.urlopen(server.metrics_url) as response:
            assert response.status == 200


def test_code_in_the_folder_where_the_server_is_started_is_never_run(
    repository, tmp_path, monkeypatch
):
    one_release(repository, tmp_path / "repository")
    for name in ("numpy", "onnxruntime", "radapter_serve", "sitecustomize", "json"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'evil')!r}, 'w')\nraise SystemExit\n"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f".:{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", f".:{os.environ.get('LD_LIBRARY_PATH', '')}")
    with tritonserver(Path("repository")) as server, Client(server.grpc_url) as client:
        assert len(client.embed_images([png(0)])) == 1
        process = psutil.Process(server.pid)
        folders = {child.cwd() for child in (process, *process.children())}
        assert folders == {str(server.folder)}
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_serves_until_it_is_stopped(repository, tmp_path, kind):
    folder = one_release(repository, tmp_path / "[repository]")
    ports = free_ports()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    front = free_ports()[0]
    names = ("http", "grpc", "metrics", "gateway")
    flags = [f"--{name}-port={port}" for name, port in zip(names, (*ports, front), strict=True)]
    command = [sys.executable, "-m", "radapter_serve.cli.serve", str(folder), *flags]
    environment = {**os.environ, "TMPDIR": str(temporary), "COLUMNS": "300"}
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        assert process.stdout is not None and process.stderr is not None
        lines: list[str] = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        shown = "".join(lines)
        assert f"http://127.0.0.1:{ports[0]}" in shown
        assert "[repository]" in shown
        [kept] = temporary.iterdir()
        assert not list(Path("/dev/shm").glob(f"{shm_prefix(kept)}*"))
        [triton] = [
            child
            for child in psutil.Process(process.pid).children()
            if "tritonserver" in " ".join(child.cmdline())
        ]
        children = [triton, *triton.children()]
        listening = [
            connection
            for connection in psutil.net_connections("tcp")
            if connection.pid == triton.pid and connection.status == psutil.CONN_LISTEN
        ]
        assert {connection.laddr.port for connection in listening} == set(ports)
        # gRPC has IPv4 mapped into IPv6.
        assert {connection.laddr.ip for connection in listening} <= {
            "127.0.0.1",
            "::ffff:127.0.0.1",
        }
        caller = stack.enter_context(socket.create_connection(("127.0.0.1", ports[0])))
        caller.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert caller.recv(100)
        urllib.request.urlopen(f"http://127.0.0.1:{front}/health/live", timeout=60).close()
        process.send_signal(kind)
        if kind == signal.SIGINT:  # an impatient user
            for _ in range(20):
                time.sleep(0.05)
                process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if kind != signal.SIGKILL else -9)
    assert "Traceback" not in errors
    # 10 s are for callers to leave.
    _, alive = psutil.wait_procs(children, 5 if kind == signal.SIGKILL else 20)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    Endpoints("127.0.0.1", *ports).check()  # the same command can start
    if kind != signal.SIGKILL:
        assert not list(folder.rglob("__pycache__"))
        assert not list(temporary.iterdir())
    assert not list(Path("/dev/shm").glob(f"{shm_prefix(kept)}*"))
