"""What is checked before a server starts; no server needed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from radapter_serve.cli.serve import keep_serving, main
from radapter_serve.errors import RAdapterError
from radapter_serve.server import processes
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.installation import (
    OUR_BACKENDS,
    Installation,
    find_tritonserver,
    our_backends,
)
from radapter_serve.server.messages import reason
from radapter_serve.server.models import models_of
from radapter_serve.server.server_process import Launch, ServerProcess
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.fake_clock import FakeClock
from tests.helpers.stand_ins import http_server


def test_repository(repository, tmp_path):
    names = ["classify", "embed_image", "embed_text", "image_encoder", "segment", "text_encoder"]
    assert models_of(repository) == {**{name: [1, 2] for name in names}, "patch_encoder": [2]}
    with pytest.raises(RAdapterError, match=r"does not exist; make it with: radapter-export"):
        models_of(tmp_path / "none")
    (tmp_path / "classify").mkdir()
    (tmp_path / "classify" / "config.template.pbtxt").touch()
    with pytest.raises(RAdapterError, match=r"holds no release; make one with: radapter-export"):
        models_of(tmp_path)


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
def test_the_handlers_of_signals_are_as_before_after_the_command(repository, usual):
    numbers = (signal.SIGTERM, signal.SIGHUP)
    seen: list[object] = []

    def start(*_: object) -> ServerProcess:
        seen.extend(map(signal.getsignal, numbers))
        os.kill(os.getpid(), signal.SIGTERM)
        raise RAdapterError("the signal is ignored")

    before = [signal.signal(number, usual) for number in numbers]
    try:
        server = TritonServer(local(repository), installation=INSTALLATION, start_process=start)
        with contextlib.suppress(SystemExit, RAdapterError):
            keep_serving(server)
        assert [signal.getsignal(number) for number in numbers] == [usual, usual]
        assert all((handler == signal.SIG_IGN) == (usual == signal.SIG_IGN) for handler in seen)
        assert (usual in seen) == (usual == signal.SIG_IGN)
        assert len(seen) == len(numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_the_command_gives_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("radapter-serve: error: the model repository ")


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


def test_a_server_on_path_needs_no_numpy_of_ours(tmp_path, monkeypatch):
    native = fake_server(tmp_path, b"", "onnxruntime")
    monkeypatch.setenv("PATH", str(native.parent))
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.1.0")
    assert find_tritonserver().binary == native


def test_what_a_killed_server_left_is_removed_and_no_more(tmp_path):
    dead, alive, new, other = (
        tmp_path / f"{name}{os.getpid()}" for name in (*["radapter-serve-test-"] * 3, "other-")
    )
    dead, alive, new = (
        path.with_name(path.name + kind) for path, kind in ((dead, "d"), (alive, "a"), (new, "n"))
    )
    for folder in (dead, alive, other):
        (folder / "models").mkdir(parents=True)
    new.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    files = [Path("/dev/shm") / (folder.name.replace("-", "_") + "_1") for folder in (dead, alive)]
    try:
        for file in files:
            file.touch()
        processes.remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([alive, new, other])
        assert [file.exists() for file in files] == [False, True]
    finally:
        os.close(lock)
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


class StandIn:
    """A process that writes a line and does nothing.

    Args:
        code: its exit status from the start; None while it runs.

    Attributes:
        on_start: called when it is started for the first time.
        launched: what it was started with, each time.
        stopped: the seconds that it had to end, each time.
    """

    pid = 2**22  # above the numbers that Linux gives

    def __init__(self, code: int | None = None) -> None:
        self.code = code
        self.launched: list[Launch] = []
        self.stopped: list[float] = []
        self.on_start: Callable[[], object] = lambda: None

    def start(self, launch: Launch, output: IO[bytes] | None) -> StandIn:
        if not self.launched:
            self.on_start()
        self.launched.append(launch)
        assert output is not None
        output.write(b'E1124 15:45:35.510363 7432 main.cc:1] "no memory"\n')
        return self

    def poll(self) -> int | None:
        return self.code

    def stop(self, grace_seconds: float) -> None:
        self.stopped.append(grace_seconds)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "tritonserver was not ready after 1 s: no memory; .*; allow more with --timeout"),
        (1, "tritonserver did not start: it ended by itself with status 1: no memory; all its"),
        (-9, "tritonserver did not start: it was killed by SIGKILL: no memory; all its messages"),
    ],
)
def test_a_server_that_does_not_start_is_stopped_and_leaves_nothing(repository, code, message):
    process = StandIn(code)
    clock = FakeClock()
    config = local(repository, timeout=1, drain_seconds=3)
    server = TritonServer(
        config, installation=INSTALLATION, start_process=process.start, clock=clock
    )
    with pytest.raises(RAdapterError, match=message):
        server.start()
    [launch] = process.launched
    assert process.stopped == [8]
    assert not launch.folder.exists()
    assert server.pid is None
    assert clock.now <= 1000 + config.timeout + 1


def test_a_server_is_started_with_its_models_and_is_started_again_with_the_same(repository):
    endpoints = Endpoints.on_free_ports()
    process = StandIn()
    config = ServerConfig(repository, endpoints, drain_seconds=3)
    server = TritonServer(config, installation=INSTALLATION, start_process=process.start)
    with contextlib.ExitStack() as stack:
        process.on_start = lambda: stack.enter_context(
            http_server(200, b"[]", port=endpoints.http_port)
        )
        with server:
            folder = server.folder
            assert server.pid == process.pid
            assert server.failures() == []
            server.restart()
            process.code = 2
            [failure] = server.failures()
            assert "it ended by itself with status 2: no memory" in str(failure)
    first, second = process.launched
    assert first == second
    models = [word.partition("=")[2] for word in first.command if word.startswith("--load-model=")]
    assert sorted(models) == sorted(models_of(repository))
    assert process.stopped == [0, 8]
    assert not folder.exists()


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
