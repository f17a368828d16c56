"""What is checked before a server starts; no server needed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tritonclient.grpc import model_config_pb2

from radapter_serve.cli.serve import keep_serving, main
from radapter_serve.errors import RAdapterError
from radapter_serve.lock import hold
from radapter_serve.release.config import without_queue_policy
from radapter_serve.server import processes
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.installation import (
    OUR_BACKENDS,
    Installation,
    find_tritonserver,
    our_backends,
)
from radapter_serve.server.launch import reason
from radapter_serve.server.models import ModelEntry, check_shared_memory, parsed
from radapter_serve.server.releases import State
from radapter_serve.server.triton_server import TritonServer


def test_a_port_in_use_is_named_with_its_flag(repository):
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports[1])), pytest.raises(RAdapterError) as error:
        TritonServer(ServerConfig(repository, Endpoints("127.0.0.1", *ports))).start()
    assert (
        f"127.0.0.1 port {ports[1]}: Address already in use; choose another with --grpc-port"
        in str(error.value)
    )


@pytest.mark.parametrize(
    ("host", "ports", "message"),
    [
        ("127.0.0.1", (8000, 8000, 8002), "must differ"),
        ("127.0.0.1", (0, 8001, 8002), "--http-port is 0; allowed are 1 to 65535"),
        ("192.0.2.1", (18000, 18001, 18002), "cannot listen on 192.0.2.1"),
        (
            "no.such.host.invalid",
            (18000, 18001, 18002),
            "--host 'no.such.host.invalid': .*; give a name or an address",
        ),
        ("", (18000, 18001, 18002), "--host ''"),
    ],
)
def test_bad_addresses(host, ports, message):
    http_port, grpc_port, metrics_port = ports
    with pytest.raises(RAdapterError, match=message):
        Endpoints(host, http_port, grpc_port, metrics_port, trust_network=True).check_ports()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_host_that_others_reach_needs_a_network_that_is_trusted(repository, host, capsys):
    assert main([str(repository), "--host", host]) == 2
    said = capsys.readouterr().err
    assert f"--host {host} lets other machines in, and asks nobody for a password" in said
    assert "radapter-gateway in front of Triton, or add --api-keys KEYS" in said
    assert "or --trust-network if you trust all" in said


@pytest.mark.parametrize("usual", [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
def test_the_handlers_of_signals_are_as_before_after_the_command(repository, usual, monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGHUP)
    seen: list[object] = []

    def start(*_: object) -> None:
        seen.extend(map(signal.getsignal, numbers))
        os.kill(os.getpid(), signal.SIGTERM)
        raise RAdapterError("the signal is ignored")

    monkeypatch.setattr(TritonServer, "start", start)
    before = [signal.signal(number, usual) for number in numbers]
    try:
        with contextlib.suppress(SystemExit, RAdapterError):
            keep_serving(TritonServer(local(repository)))
        assert [signal.getsignal(number) for number in numbers] == [usual, usual]
        assert all((handler == signal.SIG_IGN) == (usual == signal.SIG_IGN) for handler in seen)
        assert len(seen) == len(numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_the_repository_by_position_and_by_flag(tmp_path, capsys):
    none = str(tmp_path / "none")
    for arguments in ([none], ["--model-repository", none], [f"--model-repository={none}"]):
        assert main(arguments) == 2
        assert f"the model repository {none} does not exist" in capsys.readouterr().err


def test_numpy_2_and_python_313_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.1.0")
    with pytest.raises(RAdapterError, match=r"numpy 2\.1\.0 .* misreads tensors"):
        find_tritonserver()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "version_info", (3, 13, 1, "final", 0))
    with pytest.raises(RAdapterError, match=r"Python 3\.13"):
        find_tritonserver()


def fake_server(folder: Path, stub: bytes, *backends: str) -> Path:
    binary = folder / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    for name in ("python", *backends):
        (folder / "backends" / name).mkdir(parents=True)
        (folder / "backends" / name / f"libtriton_{name}.so").touch()
    (folder / "backends" / "python" / "triton_python_backend_stub").write_bytes(stub)
    return binary


def test_a_server_on_path_comes_first_and_keeps_its_backends(tmp_path, monkeypatch):
    here = f"libpython3.{sys.version_info[1]}.so".encode()
    native = fake_server(tmp_path, here, "onnxruntime", "tensorrt")
    monkeypatch.setenv("PATH", str(native.parent))
    with monkeypatch.context() as patch:  # its Python backend needs no numpy of ours
        patch.setattr("importlib.metadata.version", lambda _: "2.1.0")
        found = find_tritonserver()
    assert found.binary == native
    assert found.backends["onnxruntime"] == tmp_path / "backends" / "onnxruntime"

    (tmp_path / "backends" / "onnxruntime" / "libtriton_onnxruntime.so").unlink()
    found = find_tritonserver()
    assert found.backends["onnxruntime"] == OUR_BACKENDS / "onnxruntime"
    assert (found.backends["openvino"] / "model.py").exists()
    assembled = tmp_path / "assembled"
    assembled.mkdir()
    found.assemble(assembled)
    assert (assembled / "tensorrt" / "libtriton_tensorrt.so").exists()
    assert (assembled / "python" / "triton_python_backend_stub").exists()
    assert not (assembled / "python").is_symlink()

    (tmp_path / "backends" / "python" / "triton_python_backend_stub").write_bytes(
        b"..libpython3.7.so"
    )
    with pytest.raises(RAdapterError, match=r"is for Python 3\.7, this is Python 3\."):
        find_tritonserver()


def test_the_reason_is_found_in_the_log():
    log = (
        'W1124 15:45:35.508340 7432 pinned.cc:273] "no pinned memory"\nE1124 15:45:35.508468 7432'
        ' server.cc:241] "CudaDriverHelper has not been initialized."\nE1124 15:45:35.510363 7432'
        " model_lifecycle.cc:642] \"failed to load 'x' version 1: Internal: why\"\nE1124"
        ' 15:45:35.610363 7432 main.cc:1] "another"\n'
    )
    assert reason(log) == "failed to load 'x' version 1: Internal: why"
    assert (
        reason("".join(log.splitlines(True)[:2]))
        == 'W1124 15:45:35.508340 7432 pinned.cc:273] "no pinned memory'
    )
    assert reason(log.replace("failed to load", "x")) == "another"
    assert reason("error: no memory\nError: Failed to initialize NVML\n\n") == "error: no memory"
    assert reason("usage: ...\nunknown option\n") == "unknown option"
    assert reason("") == "it wrote nothing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "--timeout is 0; allowed are seconds above 0"),
        ({"timeout": -1}, "--timeout is -1; allowed are seconds above 0"),
        ({"timeout": float("nan")}, "--timeout is nan; allowed are seconds above 0"),
        ({"drain_seconds": 0}, "--drain-seconds is 0; allowed are whole seconds from 1"),
        ({"max_waiting": 0}, "--max-waiting is 0; allowed are 1 and more"),
        ({"threads": 0}, "--threads is 0; allowed are 1 and more"),
        ({"instances": ["nothing=2"]}, "--instances nothing=2: there is no task nothing"),
        (
            {"runtime": "torch"},
            "--runtime is torch; allowed are onnxruntime, openvino, tensorrt, auto",
        ),
    ],
)
def test_a_setting_that_is_not_allowed_is_named_with_its_flag(settings, message):
    with pytest.raises(RAdapterError, match=message):
        ServerConfig(Path("none"), **settings)


def test_folders_stay_what_they_are_where_the_current_folder_is_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ServerConfig(Path("repository"), indexes=Path("indexes"))
    assert config.model_repository == tmp_path / "repository"
    assert config.indexes == tmp_path / "indexes"


def test_hosts():
    local = Endpoints("localhost", 1, 2, 3)
    assert (local.host, local.http_url, local.loopback) == ("127.0.0.1", "http://127.0.0.1:1", True)
    six = Endpoints("::1", 1, 2, 3)
    assert (six.host, six.grpc_url, six.loopback) == ("::1", "grpc://[::1]:2", True)
    every = Endpoints("0.0.0.0", 1, 2, 3, trust_network=True)
    assert (every.host, every.metrics_url, every.loopback) == (
        "0.0.0.0",
        "http://127.0.0.1:3/metrics",
        False,
    )


def test_what_a_killed_server_left_is_removed_and_no_more(tmp_path):
    dead, alive, new, other = (
        tmp_path / f"{name}{os.getpid()}"
        for name in ("radapter-serve-d", "radapter-serve-a", "radapter-serve-n", "other-")
    )
    for folder in (dead, alive, other):
        (folder / "models").mkdir(parents=True)
    new.mkdir()
    files = [Path("/dev/shm", processes.shm_prefix(folder) + "1") for folder in (dead, alive)]
    try:
        for file in files:
            file.touch()
        with hold(alive):
            processes.remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([alive, new, other])
        assert [file.exists() for file in files] == [False, True]
    finally:
        for file in files:
            file.unlink(missing_ok=True)


INSTALLATION = Installation(Path("/bin/false"), our_backends())


def local(repository: Path, **settings: Any) -> ServerConfig:
    """The settings of a server that only this machine reaches."""
    return ServerConfig(repository, Endpoints.on_free_ports(), **settings)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
    ],
)
def test_a_full_disk_is_told_in_one_line(repository, tmp_path, monkeypatch, error):
    class Full(Installation):
        def assemble(self, folder: Path) -> None:
            raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = TritonServer(local(repository), installation=Full(Path("/bin/false"), our_backends()))
    with pytest.raises(
        RAdapterError, match=r"cannot write into .*: .*No space left on device.*; .*TMPDIR"
    ):
        server.start()
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written(repository, tmp_path):
    config = local(repository, log=tmp_path / "none" / "log")
    with pytest.raises(RAdapterError, match="cannot write the log .*none/log: No such file"):
        TritonServer(config, installation=INSTALLATION).start()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (
            "sleep 60",
            "tritonserver was not ready after 1 s: no memory; .*; allow more with --timeout",
        ),
        (
            "exit 1",
            "tritonserver did not start: it ended by itself with status 1: no memory; all its",
        ),
        ("kill -9 $$", "tritonserver did not start: it was killed by SIGKILL: no memory; all its"),
    ],
)
def test_a_server_that_does_not_start_is_stopped_and_leaves_nothing(
    repository, tmp_path, monkeypatch, end, message
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    program = tmp_path / "tritonserver"
    line = 'E1124 15:45:35.510363 7432 main.cc:1] "no memory"'
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho '{line}'\n{end}\n")
    program.chmod(0o755)
    server = TritonServer(
        local(repository, timeout=1, drain_seconds=3),
        installation=Installation(program, our_backends()),
    )
    with pytest.raises(RAdapterError, match=message):
        server.start()
    assert (server.pid, server.state) == (None, State.STOPPED)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert not list((tmp_path / "temporary").glob("radapter-serve-*"))


def test_instances_of_tasks():
    def counts(*instances):
        return ServerConfig(Path("none"), instances=instances).instance_counts()

    tasks = ("classify", "embed_image", "embed_text", "retrieve", "segment")
    assert counts() == {}
    assert counts("3") == dict.fromkeys(tasks, 3)
    assert counts("segment=4", "2") == {**dict.fromkeys(tasks, 2), "segment": 4}
    for bad in ("0", "65", "-1", "two", "segment=", "segment=0", "nothing=2", "text_encoder=2"):
        with pytest.raises(RAdapterError, match=f"--instances {bad}: "):
            counts(bad)
    model = ModelEntry((1, 2), "instance_group { count: 1 kind: KIND_CPU }")
    [group] = parsed(model.with_instances(3).config).instance_group
    assert (group.count, group.kind) == (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert model.with_instances(None) == model


def test_shared_memory_too_small_to_start_is_refused_with_what_to_set(tmp_path, monkeypatch):
    pixels = "input { data_type: TYPE_UINT8 dims: [ 224, 224, 3 ] } instance_group { count: 1 }"
    models = {
        "classify": ModelEntry((1, 2), 'backend: "python" instance_group { count: 4 }'),
        "image_encoder": ModelEntry((2,), f'backend: "onnxruntime" max_batch_size: 64 {pixels}'),
    }

    def check(backends, size, free):
        found = SimpleNamespace(f_frsize=2**20, f_blocks=size, f_bavail=free)
        monkeypatch.setattr(os, "statvfs", lambda _: found)
        return check_shared_memory(models, backends)

    in_python = ["python", "onnxruntime"]
    message = r"has 17 MiB free, and 9 model processes need 18 MiB; .*--shm-size=128m"
    with pytest.raises(RAdapterError, match=message):
        check(in_python, 64, 17)
    # 9 x (2 MiB + 64 x 224 x 224 x 3 bytes)
    warning = check(in_python, 64, 18)
    assert "/dev/shm has 64 MiB; many full batches at once need 100 MiB" in warning
    assert check(in_python, 128, 128) is None
    assert check_shared_memory(models, in_python, tmp_path / "none") is None
    with pytest.raises(RAdapterError, match="8 model processes"):  # a backend in C++ has none
        check(["python"], 64, 15)


def test_no_queue_is_limited_by_triton_which_then_overlooks_it():
    from radapter_export.repository import sources

    for template in sources().glob("*/config.template.pbtxt"):
        config = parsed(template.read_text())
        assert not config.dynamic_batching.HasField("default_queue_policy"), template
        assert config.HasField("dynamic_batching") == bool(config.max_batch_size), template
    policy = "default_queue_policy { max_queue_size: 128 } priority_levels: 2"
    for rows, batching in ((8, "dynamic_batching { }"), (0, "")):
        head = f'name: "x" max_batch_size: {rows} '
        config = parsed(f"{head} dynamic_batching {{ {policy} }}")
        without_queue_policy(config)
        assert config == parsed(head + batching)


def test_a_secret_is_taken_out_of_the_command_line_of_a_child():
    code = "import sys; print('ready', flush=True); sys.stdin.read(); print(sys.argv[1])"
    command = [sys.executable, "-c", code, "--flag=s3cret", "last one"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        processes.hide_argument(child.pid, "s3cret")
        seen = Path(f"/proc/{child.pid}/cmdline").read_text().split("\0")
        assert seen[-3:] == ["--flag=      ", "last one", ""]
        assert child.communicate("")[0] == "--flag=s3cret\n"  # what it has read, it keeps
    processes.hide_argument(child.pid, "s3cret")  # who is gone has none
