"""Checks before a server starts, and a start that fails; no tritonserver needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tritonclient.grpc import model_config_pb2

from radapter_serve.cli.serve import keep_serving, main
from radapter_serve.errors import RAdapterError
from radapter_serve.files import hold
from radapter_serve.release.config import parsed
from radapter_serve.release.repository import Served
from radapter_serve.server.config import Endpoints, ServerConfig
from radapter_serve.server.launch import (
    OUR_BACKENDS,
    Installation,
    find_tritonserver,
    hide_argument,
    lay_out,
    reason_in,
    server_folder,
    shm_prefix,
)
from radapter_serve.server.models import ModelEntry, check_shared_memory, expected_memory
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import tritonserver


@pytest.mark.parametrize(
    ("host", "http_port", "message"),
    [
        ("127.0.0.1", 18001, "must differ"),
        ("127.0.0.1", 0, "--http-port is 0; allowed"),
        ("192.0.2.1", 18000, "cannot listen on 192.0.2.1"),
        ("no.such.host.invalid", 18000, "--host 'no.such.host.invalid'"),
        ("", 18000, "--host ''"),
    ],
)
def test_bad_addresses(host, http_port, message):
    with pytest.raises(RAdapterError, match=message):
        Endpoints(host, http_port, 18001, 18002, trust_network=True).check()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_host_that_others_reach_needs_a_network_that_is_trusted(repository, host, capsys):
    assert main([str(repository), "--engine", "triton", "--host", host]) == 2
    assert f"--host {host} lets other machines in" in capsys.readouterr().err


@pytest.mark.parametrize("usual", [signal.SIG_DFL, signal.SIG_IGN])
def test_the_handlers_of_signals_are_as_before_after_the_command(repository, usual, monkeypatch):
    seen: list[object] = []

    def start(*_: object) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        raise RAdapterError("the signal is ignored")

    monkeypatch.setattr(TritonServer, "start", start)
    before = signal.signal(signal.SIGTERM, usual)
    try:
        with contextlib.suppress(SystemExit, RAdapterError):
            keep_serving(tritonserver(repository))
        assert signal.getsignal(signal.SIGTERM) == usual
        assert (seen == [signal.SIG_IGN]) == (usual == signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_numpy_2_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.1.0")
    with pytest.raises(RAdapterError, match=r"numpy 2\.1\.0"):
        find_tritonserver()


def test_a_server_on_path_comes_first_and_keeps_its_backends(tmp_path, monkeypatch):
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    backends = tmp_path / "backends"
    for name in ("python", "onnxruntime", "tensorrt"):
        (backends / name).mkdir(parents=True)
        (backends / name / f"libtriton_{name}.so").touch()
    stub = backends / "python" / "triton_python_backend_stub"
    stub.write_bytes(f"libpython3.{sys.version_info[1]}.so".encode())
    monkeypatch.setenv("PATH", str(binary.parent))
    with monkeypatch.context() as patch:  # its Python backend needs no numpy of ours
        patch.setattr("importlib.metadata.version", lambda _: "2.1.0")
        installation = find_tritonserver()
    assert installation.binary == binary
    assert installation.backends["onnxruntime"] == backends / "onnxruntime"

    # Ours takes the place of a backend that is missing.
    (backends / "onnxruntime" / "libtriton_onnxruntime.so").unlink()
    installation = find_tritonserver()
    assert installation.backends["onnxruntime"] == OUR_BACKENDS["onnxruntime"]
    assert (installation.backends["openvino"] / "model.py").exists()
    folder = tmp_path / "server"
    folder.mkdir()
    lay_out(folder, installation, tmp_path, {})
    assert (folder / "backends" / "tensorrt" / "libtriton_tensorrt.so").exists()
    assert (folder / "backends" / "python" / "triton_python_backend_stub").exists()
    assert not (folder / "backends" / "python").is_symlink()

    stub.write_bytes(b"..libpython3.7.so")
    with pytest.raises(RAdapterError, match=r"is for Python 3\.7, this is Python 3\."):
        find_tritonserver()


def test_the_reason_in_a_log():
    log = (
        'E1124 15:45:35.508468 7432 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        "E1124 15:45:35.510363 7432 model_lifecycle.cc:642] \"failed to load 'x' version 1\"\n"
        'E1124 15:45:35.610363 7432 main.cc:1] "another"\n'
    )
    assert reason_in(log) == "failed to load 'x' version 1"
    assert reason_in(log.replace("failed to load", "x")) == "another"
    assert reason_in("error: no memory\nError: Failed to initialize NVML\n") == "error: no memory"


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        *(({"timeout": seconds}, "--timeout is") for seconds in (0, -1, float("nan"))),
        ({"drain_seconds": 0}, "--drain-seconds is 0"),
        ({"max_waiting": 0}, "--max-waiting is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"runtime": "torch"}, "--runtime is torch; allowed are onnxruntime, openvino"),
        *(
            ({"instances": [count]}, f"--instances {count}: ")
            for count in ("0", "65", "-1", "two", "segment=", "segment=0", "text_encoder=2")
        ),
    ],
)
def test_a_setting_that_is_not_allowed_is_named_with_its_flag(settings, flag):
    with pytest.raises(RAdapterError, match=flag):
        ServerConfig(Path("none"), **settings)


def test_instances_of_tasks():
    tasks = ("classify", "embed_image", "embed_text", "retrieve", "segment")
    for instances, counts in (
        ((), {}),
        (("3",), dict.fromkeys(tasks, 3)),
        (("segment=4", "2"), {**dict.fromkeys(tasks, 2), "segment": 4}),
    ):
        assert ServerConfig(Path("none"), instances=instances).instance_counts() == counts
    model = ModelEntry((1, 2), "instance_group { count: 1 kind: KIND_CPU }")
    [group] = parsed(model.with_instances(3).config).instance_group
    assert (group.count, group.kind) == (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert model.with_instances(None) == model


def test_what_a_killed_server_left_is_removed_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, alive, new, other = (
        tmp_path / f"{name}{os.getpid()}"
        for name in ("radapter-serve-d", "radapter-serve-a", "radapter-serve-n", "other-")
    )
    for folder in (dead, alive, other):
        (folder / "models").mkdir(parents=True)
    new.mkdir()
    files = [Path("/dev/shm", shm_prefix(folder) + "1") for folder in (dead, alive)]
    try:
        for file in files:
            file.touch()
        with hold(alive), server_folder() as folder:
            assert sorted(tmp_path.iterdir()) == sorted([alive, new, other, folder])
        assert sorted(tmp_path.iterdir()) == sorted([alive, new, other])
        assert [file.exists() for file in files] == [False, True]
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def pids(folder: Path) -> list[int]:
    """Numbers of the processes of fake servers, which note them in the file `pids`."""
    file = folder / "pids"
    return list(map(int, file.read_text().split())) if file.exists() else []


@pytest.mark.parametrize(
    ("end", "message", "starts"),
    [
        ("sleep 60", "was not ready after 60 s: no memory; .*; allow more with --timeout", 1),
        ("exit 1", "did not start: it ended with status 1: no memory; all its", 1),
        ("kill -ABRT $$", "did not start: it was killed by SIGABRT: no memory; all its", 2),
        # As the kernel does where memory is short: another try would take it from others.
        ("kill -KILL $$", "did not start: it was killed by SIGKILL.*: no memory; all its", 1),
    ],
)
def test_a_server_that_does_not_start_is_stopped_and_leaves_nothing(
    repository, tmp_path, monkeypatch, end, message, starts
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    line = 'E1124 15:45:35.510363 7432 main.cc:1] "no memory"'
    program = tmp_path / "tritonserver"
    program.write_text(f"#!/bin/sh\necho '{line}'\necho $$ >> {tmp_path}/pids\n{end}\n")
    program.chmod(0o755)

    class Clock:
        """A minute passes once the program sleeps."""

        def monotonic(self) -> float:
            return 61.0 if "sleep" in end and pids(tmp_path) else 0.0

        def sleep(self, seconds: float, /) -> None:
            time.sleep(0.01)

    config = ServerConfig(repository, Endpoints.on_free_ports(), timeout=60)
    server = TritonServer(config, installation=Installation(program, OUR_BACKENDS), clock=Clock())
    with pytest.raises(RAdapterError, match=f"tritonserver {message}"):
        server.start()
    assert server.pid is None
    assert len(pids(tmp_path)) == starts and not any(map(psutil.pid_exists, pids(tmp_path)))
    assert not list(temporary.iterdir())


def test_shared_memory_too_small_to_start_is_refused_with_what_to_set(tmp_path, monkeypatch):
    pixels = "input { data_type: TYPE_UINT8 dims: [ 224, 224, 3 ] } instance_group { count: 1 }"
    models = {
        "classify": ModelEntry((1, 2), 'backend: "python" instance_group { count: 4 }'),
        "image_encoder": ModelEntry((2,), f'backend: "onnxruntime" max_batch_size: 64 {pixels}'),
    }

    def check(backends, size, free):
        memory = SimpleNamespace(total=size * 2**20, free=free * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: memory)
        return check_shared_memory(models, backends)

    in_python = ["python", "onnxruntime"]
    message = r"has 17 MiB free, and 9 model processes need 18 MiB; .*--shm-size=128m"
    with pytest.raises(RAdapterError, match=message):
        check(in_python, 17, 17)
    # What others have taken is beside it.
    message = r"17 MiB free beside 47 MiB of other programs \(ls -lS .*\), .*--shm-size=256m"
    with pytest.raises(RAdapterError, match=message):
        check(in_python, 64, 17)
    # 9 x (2 MiB + 64 x 224 x 224 x 3 bytes)
    assert "many full batches at once need 100 MiB" in check(in_python, 64, 18)
    assert "99 MiB free beside" in check(in_python, 128, 99)
    assert check(in_python, 128, 128) is None
    assert check_shared_memory(models, in_python, tmp_path / "none") is None
    with pytest.raises(RAdapterError, match="8 model processes"):  # a backend in C++ has none
        check(["python"], 64, 15)


def test_a_secret_is_taken_out_of_the_command_line_of_a_child():
    code = "import sys; print('ready', flush=True); sys.stdin.read(); print(sys.argv[1])"
    command = [sys.executable, "-c", code, "--flag=s3cret", "last one"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        hide_argument(child.pid, "s3cret")
        seen = Path(f"/proc/{child.pid}/cmdline").read_text().split("\0")
        assert seen[-3:] == ["--flag=      ", "last one", ""]
        assert child.communicate("")[0] == "--flag=s3cret\n"  # what it has read, it keeps
    hide_argument(child.pid, "s3cret")  # a process that is gone has none


def test_what_releases_take_is_known_beforehand(releases: Path) -> None:
    """Two releases with three encoders each; their five tasks have two processes, one has three."""
    counts = ServerConfig(releases, instances=("2", "segment=3")).instance_counts()
    by_triton, processes, by_engine = expected_memory(releases, [1, 2], counts)
    assert processes == 2 * (3 + 4 * 2 + 3)
    graphs = sum(path.stat().st_size for path in releases.glob("*_encoder/*/model.onnx"))
    fewer, *_ = expected_memory(releases, [1, 2], {})
    assert (by_triton - fewer) / (processes - 2 * (3 + 5)) > 40 * 2**20  # a process of a task
    assert graphs < by_engine < by_triton


def test_many_processes_have_longer_to_start() -> None:
    server = TritonServer(ServerConfig())
    assert server.timeout == 120
    task = ModelEntry(tuple(range(1, 31)), "instance_group { count: 2 }")
    encoder = ModelEntry(tuple(range(1, 31)), "")
    server.offered = {"classify": task, "text_encoder": encoder}
    assert server.timeout == 3 * (60 + 30)
    server = TritonServer(ServerConfig(timeout=5))
    server.offered = {"classify": task}
    assert server.timeout == 5


@pytest.mark.parametrize(
    ("served", "flags", "instances"),
    [
        ([1], [], "2"),
        ([1, 2, 3], [], "1"),
        ([1, 2, 3], ["--instances", "2"], "2"),
    ],
)
def test_many_releases_have_one_process_for_each_task_by_default(
    monkeypatch, tmp_path, capsys, served, flags, instances
):
    for version in served:
        (tmp_path / "classify" / str(version)).mkdir(parents=True)
        (tmp_path / "classify" / str(version) / "release.json").touch()
    Served(tuple(served)).save(tmp_path)
    started: list[ServerConfig] = []

    def start(config: ServerConfig) -> None:
        started.append(config)
        raise RAdapterError("it is enough")

    monkeypatch.setattr("radapter_serve.server.triton_server.TritonServer", start)
    monkeypatch.setattr("radapter_serve.cli.serve.memory_limit", lambda: 2**28)
    assert main([str(tmp_path), "--engine", "triton", *flags]) == 2
    assert started[0].instances == (instances,)
    said = capsys.readouterr().err
    assert ("GiB of memory" in said) == (len(served) > 1)
    assert ("0.2 GiB are free, which is less" in said) == (len(served) > 1)
