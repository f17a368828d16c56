"""The served tasks against the same tasks in this process, on a real tritonserver."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from radapter_client import Client
from radapter_serve.encoders.needs import complete
from radapter_serve.errors import RAdapterError
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.control import SECRET_HEADER
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.processes import shm_prefix
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.tasks.classify import ClassifyRequest
from radapter_serve.tasks.classify import classify as run_classify
from radapter_serve.tasks.embed import EmbedImagesRequest, embed_images
from radapter_serve.tasks.labels import Labels
from tests.helpers.asking import connect, post, tensor
from tests.helpers.small_release import Local, png, png_header

pytestmark = pytest.mark.triton


def numbers(name: str, values: list[list[int]]) -> grpc.InferInput:
    return tensor(name, np.array(values, np.int32))


def classify(client, images, labels=None, label_set=None, templates=None, top_k=None, version=""):
    count = len(images)
    inputs = [tensor("image", [[image] for image in images])]
    if labels is not None:
        inputs.append(tensor("labels", [labels] * count))
    if label_set is not None:
        inputs.append(tensor("label_set", [[label_set]] * count))
    if templates is not None:
        inputs.append(tensor("templates", [templates] * count))
    if top_k is not None:
        inputs.append(numbers("top_k", [[top_k]] * count))
    result = client.infer("classify", inputs, model_version=version)
    return result.as_numpy("label"), result.as_numpy("score")


def check(local: Local, served, request: ClassifyRequest) -> None:
    """All rows of an answer have as many labels."""
    rankings = complete(run_classify(local.loaded, request))
    labels, scores = served
    assert [[one.decode() for one in row if one] for row in labels] == [
        list(one.labels) for one in rankings
    ]
    for row, ranking in zip(scores, rankings, strict=True):
        np.testing.assert_allclose(row[: len(ranking.labels)], ranking.scores, rtol=1e-4)


def asked(images: list[bytes], labels: list[bytes] | None = None, **options) -> ClassifyRequest:
    """A request by labels, or by a label set, with templates."""
    names = None if labels is None else [one.decode() for one in labels]
    named = {key: options.pop(key) for key in ("label_set", "templates") if key in options}
    return ClassifyRequest(images, Labels(names, **named), **options)


@pytest.mark.parametrize("version", [1, 2])
def test_served_equals_local(client, repository, version):
    local = Local(repository, version)
    number = str(version)
    images = [png(0), png(1, kind="JPEG"), png(2, 60, 61, kind="WEBP")]
    found = client.infer(
        "embed_image", [tensor("image", [[i] for i in images])], model_version=number
    )
    np.testing.assert_allclose(
        found.as_numpy("image_embeds"),
        complete(embed_images(local.loaded, EmbedImagesRequest(images))),
        atol=1e-6,
    )

    texts = [b"a cat", "Ölkäfer 猫".encode(), b"word " * 200]
    found = client.infer("embed_text", [tensor("text", [[t] for t in texts])], model_version=number)
    np.testing.assert_allclose(
        found.as_numpy("text_embeds"),
        local.loaded.embed_texts([one.decode() for one in texts]),
        atol=1e-6,
    )

    labels = [b"cat", b"dog, hound", b"bird"]
    served = classify(client, images, labels, top_k=2, version=number)
    check(local, served, asked(images, labels, top_k=2))
    served = classify(client, images, labels, templates=[b"one {}", b"two {}"], version=number)
    check(local, served, asked(images, labels, templates=["one {}", "two {}"]))
    served = classify(client, images, label_set=b"colours", version=number)
    check(local, served, asked(images, label_set="colours"))


def test_versions_differ_and_the_newest_is_the_default(client):
    first, second, default = (
        classify(client, [png(0)], label_set=b"colours", version=v)[1] for v in ("1", "2", "")
    )
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(second, default)


def test_labels_that_stand_alone_and_calibrated_scores(server, client, local):
    images = [png(seed) for seed in range(4)]
    labels = [b"red", b"green", b"blue", b"a cat", b"a dog"]
    shared = [tensor("image", [[image] for image in images]), tensor("labels", [labels] * 4)]
    yes = tensor("multi_label", np.ones((4, 1), bool))
    for more, options in (
        ([yes], {"multi_label": True}),
        (
            [yes, tensor("threshold", np.full((4, 1), 0.999, np.float32))],
            {"multi_label": True, "threshold": 0.999},
        ),
        ([tensor("calibrated", np.ones((4, 1), bool))], {"calibrated": True}),
    ):
        result = client.infer("classify", shared + more)
        found = result.as_numpy("label"), result.as_numpy("score")
        check(local, found, asked(images, labels, **options))
    body = [
        {
            "name": "image",
            "shape": [1, 1],
            "datatype": "BYTES",
            "data": [base64.b64encode(images[0]).decode()],
        },
        {
            "name": "labels",
            "shape": [1, 5],
            "datatype": "BYTES",
            "data": [label.decode() for label in labels],
        },
        {"name": "multi_label", "shape": [1, 1], "datatype": "BOOL", "data": [True]},
        {"name": "threshold", "shape": [1, 1], "datatype": "FP32", "data": [0.0]},
    ]
    status, found = post(server, "models/classify/infer", {"inputs": body})
    assert status == 200 and len(found["outputs"][0]["data"]) == 5
    status, found = post(server, "models/classify/infer", {"inputs": [*body[:2], body[3]]})
    assert status == 400 and "[invalid_argument] threshold" in found["error"]


def test_new_labels_are_embedded_once_for_all_processes(server, client):
    """Two of `classify` and two of `segment`, in turn."""
    labels = ["asked of everybody", "by many callers"]

    def encoded() -> int:
        models = client.get_inference_statistics("text_encoder").model_stats
        return sum(model.inference_stats.success.count for model in models)

    with Client(server.grpc_url) as asking, ThreadPoolExecutor(4) as callers:
        before = encoded()
        asking.classify(png(0), labels)
        list(callers.map(lambda _: asking.classify(png(0), labels), range(12)))
        list(callers.map(lambda _: asking.segment(png(0), labels), range(12)))
        assert encoded() == before + 1


def test_many_callers_with_lists_of_all_lengths_and_broken_images_among_them(client, local):
    def call(index: int):
        labels = [f"label {n}".encode() for n in range(1 + index % 5)]
        image = b"nonsense" if index % 7 == 3 else png(index % 4)
        try:
            return image, labels, classify(client, [image], labels)
        except InferenceServerException as error:
            return image, labels, error

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(call, range(80)))
    for image, labels, result in results:
        if image == b"nonsense":
            assert result.message().startswith("[invalid_image] ")
        else:
            check(local, result, asked([image], labels))
    statistics = client.get_inference_statistics("image_encoder", "2").model_stats[0]
    assert statistics.execution_count < statistics.inference_count  # some were encoded together


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"images": [b"nonsense"], "labels": [b"a"]}, r"\[invalid_image\] "),
        ({"images": [png_header(60_000, 60_000)], "labels": [b"a"]}, r"\[image_too_large\] "),
        ({"images": [png(0)]}, r"\[no_labels\] .*label_set of this release: colours"),
        (
            {"images": [png(0)], "labels": [b"a", b" "]},
            r"\[invalid_argument\] label 2 of 2 is",
        ),
        ({"images": [png(0)], "label_set": b"x"}, r"\[unknown_label_set\] no label set 'x' "),
    ],
)
def test_errors_reach_the_caller(client, request_, message):
    with pytest.raises(InferenceServerException) as error:
        classify(client, **request_)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert re.match(message, error.value.message())


def test_a_caller_who_gives_up_does_not_hold_up_the_others(client):
    def encoded() -> int:
        return sum(
            stats.inference_count
            for stats in client.get_inference_statistics("text_encoder").model_stats
        )

    labels = [f"nobody's label {index}".encode() for index in range(20_000)]
    inputs = [tensor("image", [[png(0)]]), tensor("labels", [labels])]
    before = encoded()
    call = client.async_infer("classify", inputs, callback=lambda result, error: None)
    while encoded() == before:
        time.sleep(0.005)
    call.cancel()
    classify(client, [png(0)], [b"cat"])
    assert encoded() - before < 20_000


def test_json_over_http_as_curl_sends_it(server, local):
    body = {
        "inputs": [
            {
                "name": "image",
                "shape": [1, 1],
                "datatype": "BYTES",
                "data": [base64.b64encode(png(0)).decode()],
            },
            {"name": "labels", "shape": [1, 2], "datatype": "BYTES", "data": ["a cat", "a dog"]},
        ]
    }
    status, answer = post(server, "models/classify/infer", body)
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    [ranking] = complete(run_classify(local.loaded, asked([png(0)], [b"a cat", b"a dog"])))
    assert status == 200
    assert outputs["label"] == list(ranking.labels)
    np.testing.assert_allclose(outputs["score"], ranking.scores, rtol=1e-5)

    body["inputs"][0]["data"] = ["nonsense"]
    status, answer = post(server, "models/classify/infer", body)
    assert status == 400
    assert answer["error"].startswith("[invalid_image] ")


def processes_of(pid: int) -> dict[int, str]:
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found[int(child)] = (
                Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            )
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until_dead(server: TritonServer) -> None:
    """Ends by what `check` raises."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        server.check()
        time.sleep(0.1)


def one_release(repository: Path, folder: Path) -> Path:
    for name in ("image_encoder", "embed_image"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("1"))
    return folder


def test_a_model_that_does_not_load_is_named_with_the_reason(repository, tmp_path):
    folder = one_release(repository, tmp_path / "repository")
    (folder / "image_encoder" / "2" / "model.onnx").write_bytes(b"not a graph")
    server = TritonServer(ServerConfig(folder, Endpoints.on_free_ports()))
    with pytest.raises(
        RAdapterError,
        match=r"did not start: it ended by itself with status 1: "
        r"failed to load 'image_encoder' version 2: .*Protobuf.*; all its messages: ",
    ):
        server.start()
    assert server.pid is None
    shutil.copy(repository / "image_encoder" / "2" / "model.onnx", folder / "image_encoder" / "2")
    with server:  # the same object can start again
        assert server.models == {"embed_image": [2], "image_encoder": [2]}


def test_only_what_is_a_model_is_served_and_nobody_can_load_another(repository, tmp_path):
    folder = one_release(repository, tmp_path / "repository")
    for name in (".export-x", "notes"):
        (folder / name / "1").mkdir(parents=True)
    (folder / "README.md").touch()
    evil = tmp_path / "evil"
    code = (
        f"open({str(evil)!r}, 'w')\nclass TritonPythonModel:\n    def execute(self, requests):"
        " return []\n"
    )
    config = json.dumps({"backend": "python", "max_batch_size": 0})
    with (
        TritonServer(ServerConfig(folder, Endpoints("localhost", *free_ports()))) as server,
        connect(server) as client,
    ):
        assert list(server.models) == ["embed_image", "image_encoder"]
        files = {"file:1/model.py": code.encode()}
        for headers in (None, {SECRET_HEADER: "0" * 64}, {SECRET_HEADER: ""}):
            for call in (
                partial(client.load_model, "embed_image", headers, config=config, files=files),
                partial(client.unload_model, "embed_image", headers),
                partial(client.get_model_repository_index, headers),
            ):
                with pytest.raises(InferenceServerException, match="restricted"):
                    call()
        body = {
            "parameters": {
                "config": config,
                "file:1/model.py": base64.b64encode(code.encode()).decode(),
            }
        }
        for name in ("evil", "embed_image"):
            status, answer = post(server, f"repository/models/{name}/load", body)
            assert (status, "restricted" in answer["error"]) == (403, True)
        assert client.is_model_ready("embed_image")
        # Nobody reads the secret from the command line, and who has it may.
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
        assert "--http-restricted-api" in arguments and server._secret not in arguments
        assert server.control.serving() == {"embed_image": [2], "image_encoder": [2]}
        server.control.unload("embed_image")
        assert not client.is_model_ready("embed_image")
        with pytest.raises(RAdapterError, match="failed to load 'nothing'"):
            server.control.load("nothing")
        server.control.load("embed_image")
        assert client.infer("embed_image", [tensor("image", [[png(0)]])]).as_numpy(
            "image_embeds"
        ).shape == (1, 8)
    assert not evil.exists()


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
    with (
        TritonServer(ServerConfig(Path("repository"), Endpoints.on_free_ports())) as server,
        connect(server) as client,
    ):
        assert (
            client.infer("embed_image", [tensor("image", [[png(0)]])])
            .as_numpy("image_embeds")
            .shape[0]
            == 1
        )
        assert server.pid is not None
        pids = [server.pid, *processes_of(server.pid)]
        assert {Path(f"/proc/{pid}/cwd").readlink() for pid in pids} == {server.folder}
    assert not (tmp_path / "evil").exists()


def bad(name: str, shape: list[int], data: list[object], kind: str = "BYTES") -> dict[str, object]:
    return {"name": name, "shape": shape, "datatype": kind, "data": data}


def test_a_large_body_with_its_content_type_is_answered(server):
    sent = bad("image", [1, 1], [base64.b64encode(png(0) + bytes(6 << 20)).decode()])
    assert post(server, "models/embed_image/infer", {"inputs": [sent]})[0] == 200
    assert (
        post(
            server,
            "models/embed_image/infer",
            {"inputs": [bad("image", [1, 1], ["A" * (8 << 20)])]},
        )[0]
        == 400
    )


def test_a_large_body_without_its_content_type_is_named_as_what_ends_the_server(
    repository, tmp_path
):
    """A fault of tritonserver 2.51; where a newer one answers, this test and the warnings in the
    docs can go.
    """
    with TritonServer(
        ServerConfig(one_release(repository, tmp_path / "repository"), Endpoints.on_free_ports())
    ) as server:
        with pytest.raises(
            (http.client.RemoteDisconnected, urllib.error.URLError, ConnectionResetError)
        ):
            urllib.request.urlopen(f"{server.http_url}/v2/any", b" " * (5 << 20), timeout=30)
        with pytest.raises(
            RAdapterError,
            match="segmentation fault.*Content-Type: application/json.*radapter-serve",
        ):
            until_dead(server)


def test_bad_requests_answer_400_while_good_ones_are_answered(server, client, local):
    image = base64.b64encode(png(0)).decode()
    both = [bad("image", [1, 1], [image]), bad("labels", [1, 1], ["a"])]
    refused = [
        ("classify", [*both, bad("templates", [1, 0], [])]),
        ("classify", [both[0], bad("labels", [1, 0], [])]),
        ("classify", both[1:]),
        ("classify", [bad("image", [0, 1], [])]),
        ("embed_image", [bad("alpha", [1, 1], [0.5], "FP32")]),
        ("embed_text", [bad("alpha", [1, 1], [0.5], "FP32")]),
        ("segment", [bad("labels", [1], ["a"])]),
        (
            "segment",
            [bad("image", [1], [image]), bad("labels", [1], ["a"]), bad("templates", [0], [])],
        ),
        ("text_encoder", [bad("tokens", [0, 0], [], "INT32")]),
        ("text_encoder", [bad("tokens", [1, 0], [], "INT32")]),
        ("text_encoder", [bad("tokens", [1, 1], [10**6], "INT32")]),
        ("text_encoder", [bad("tokens", [1, 1], [-1], "INT32")]),
    ]
    with ThreadPoolExecutor(16) as pool:
        wrong = [
            pool.submit(post, server, f"models/{model}/infer", {"inputs": sent})
            for model, sent in refused * 4
        ]
        good = [pool.submit(classify, client, [png(n % 4)], [b"cat", b"dog"]) for n in range(40)]
    for n, served in enumerate(good):
        check(local, served.result(), asked([png(n % 4)], [b"cat", b"dog"]))
    for answer in wrong:
        status, said = answer.result()
        assert status == 400
        assert (
            "\n" not in said["error"] and ".py" not in said["error"] and "/tmp" not in said["error"]
        )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_listens_on_loopback_only(repository, tmp_path, host):
    folder = one_release(repository, tmp_path / "repository")
    ports = free_ports()
    with TritonServer(ServerConfig(folder, Endpoints(host, *ports))) as server:
        listening = {}
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                address, port = line.split()[1].split(":")
                if line.split()[3] == "0A" and int(port, 16) in ports:
                    listening[int(port, 16)] = address
        assert sorted(listening) == sorted(ports)
        # gRPC has IPv4 mapped into IPv6.
        four = {"0100007F", "0000000000000000FFFF00000100007F"}
        assert set(listening.values()) <= (
            four if host == "127.0.0.1" else {"00000000000000000000000001000000"}
        )
        with urllib.request.urlopen(server.metrics_url) as response:
            assert response.status == 200
        with connect(server) as client:
            found = client.infer("embed_image", [tensor("image", [[png(0)]])])
            assert found.as_numpy("image_embeds").shape == (1, 8)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_command_serves_until_it_is_stopped(repository, tmp_path, kind):
    if signal.getsignal(kind) == signal.SIG_IGN:
        pytest.skip(f"{kind.name} is ignored here, and in what is started here")
    folder = one_release(repository, tmp_path / "[repository]")
    ports = free_ports()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    flags = [
        f"--{name}-port={port}"
        for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)
    ]
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
        assert re.search(r"image_encoder\W+2\W", shown)
        assert "2: ViT-B-32 at alpha 0.5, fp32" in shown
        [kept] = temporary.iterdir()
        assert not list(Path("/dev/shm").glob(f"{shm_prefix(kept)}*"))
        [triton] = [
            pid for pid, command in processes_of(process.pid).items() if "tritonserver" in command
        ]
        children = [triton, *processes_of(triton)]
        caller = stack.enter_context(socket.create_connection(("127.0.0.1", ports[0])))
        caller.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert caller.recv(100)
        process.send_signal(kind)
        if kind == signal.SIGINT:  # an impatient user
            for _ in range(20):
                time.sleep(0.05)
                process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if kind != signal.SIGKILL else -9)
    assert "Traceback" not in errors
    deadline = time.monotonic() + (
        5 if kind == signal.SIGKILL else 20
    )  # 10 s are for callers to leave
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))
    Endpoints("127.0.0.1", *ports).check_ports()  # the same command can start
    if kind != signal.SIGKILL:
        assert not list(folder.rglob("__pycache__"))
        assert not list(temporary.iterdir())
    assert not list(Path("/dev/shm").glob(f"{shm_prefix(kept)}*"))


def test_a_request_may_say_how_long_its_caller_waits(client):
    """The parameter `timeout` of KServe, in microseconds, reaches the process of a task."""
    inputs = [tensor("image", [[png(0)]])]
    assert client.infer("embed_image", inputs, timeout=60_000_000)
    with pytest.raises(InferenceServerException, match=r"\[timed_out\] .* more than 1e-06 s"):
        client.infer("embed_image", inputs, timeout=1)
