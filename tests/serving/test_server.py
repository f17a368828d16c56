"""What is checked before a server starts; no server needed."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from small_release import free_ports

from radapter_serve.cli.serve import main
from radapter_serve.errors import RAdapterError
from radapter_serve.serving import server as module
from radapter_serve.serving.server import TritonServer, find_tritonserver, models_of, reason


def test_repository(repository, tmp_path):
    names = ["classify", "embed_image", "embed_text", "image_encoder", "text_encoder"]
    assert models_of(repository) == {name: [1, 2] for name in names}
    with pytest.raises(RAdapterError, match=r"does not exist; make it with: radapter-export"):
        models_of(tmp_path / "none")
    (tmp_path / "classify").mkdir()
    (tmp_path / "classify" / "config.template.pbtxt").touch()
    with pytest.raises(RAdapterError, match=r"holds no release; make one with: radapter-export"):
        models_of(tmp_path)


def test_a_port_in_use_is_named_with_its_flag(repository):
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports[1])), pytest.raises(RAdapterError) as error:
        TritonServer(repository, "127.0.0.1", *ports).start()
    assert f"127.0.0.1 port {ports[1]}: Address already in use; choose another with --grpc-port" in str(error.value)


@pytest.mark.parametrize(
    ("host", "ports", "message"),
    [
        ("127.0.0.1", (8000, 8000, 8002), "must differ"),
        ("127.0.0.1", (0, 8001, 8002), "--http-port is 0; allowed are 1 to 65535"),
        ("192.0.2.1", (18000, 18001, 18002), "cannot listen on 192.0.2.1"),
    ],
)
def test_bad_addresses(repository, host, ports, message):
    with pytest.raises(RAdapterError, match=message):
        TritonServer(repository, host, *ports).start()


def test_the_command_gives_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("radapter-serve: error: the model repository ")


def test_numpy_2_and_python_313_are_refused(monkeypatch):
    monkeypatch.setattr(module.importlib.metadata, "version", lambda _: "2.1.0")
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
    assert (found.backends["onnxruntime"] / "model.py").exists()
    assembled = tmp_path / "assembled"
    assembled.mkdir()
    found.assemble(assembled)
    assert (assembled / "tensorrt" / "libtriton_tensorrt.so").exists()
    assert (assembled / "python" / "triton_python_backend_stub").exists()
    assert not (assembled / "python").is_symlink()

    (tmp_path / "backends" / "python" / "triton_python_backend_stub").write_bytes(b"..libpython3.7.so")
    with pytest.raises(RAdapterError, match=r"is for Python 3\.7, this is Python 3\."):
        find_tritonserver()


def test_the_reason_is_found_in_the_log():
    log = (
        'W1124 15:45:35.508340 7432 pinned.cc:273] "no pinned memory"\n'
        'E1124 15:45:35.508468 7432 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        "E1124 15:45:35.510363 7432 model_lifecycle.cc:642] \"failed to load 'x' version 1: Internal: why\"\n"
    )
    assert reason(log) == "failed to load 'x' version 1: Internal: why"
    assert reason("usage: ...\nunknown option\n") == "unknown option"
    assert reason("") == "it wrote nothing"
