"""An exported graph in each runtime of this process, against torch's own embeddings."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from radapter_serve.encoders import encoder as module
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.release import Release


@pytest.mark.parametrize("name", ["image_encoder", "text_encoder"])
def test_openvino_computes_what_torch_computed(
    exported_tiny_clip: Path, name: str, tmp_path: Path
) -> None:
    folder = exported_tiny_clip / "model_repository" / name / "2"
    encoder = EncoderGraph(folder / "model.onnx", "openvino", threads=1)
    assert compare(name, encoder, Samples.load(folder), 1e-5).min_cosine > 1 - 1e-6
    # Weights in a file of their own, as those above 2 GB are.
    model = onnx.load(folder / "model.onnx")
    assert not (folder / "model.onnx.data").exists()
    apart = tmp_path / "apart.onnx"
    onnx.save(model, apart, save_as_external_data=True, location="apart.data", size_threshold=0)
    assert (
        compare(
            name, EncoderGraph(apart, "openvino", threads=1), Samples.load(folder), 1e-5
        ).max_error
        < 1e-5
    )


def test_the_memory_of_a_large_run_is_given_back(tmp_path: Path) -> None:
    """4 MiB between the layers for each row; what runs of 8 rows take stays for the next."""
    weight = numpy_helper.from_array(np.ones((1, 1024), np.float32), "weight")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["wide"]),
            helper.make_node("ReduceMax", ["wide"], ["y"], keepdims=0, axes=[1, 2]),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1024, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 10
    onnx.save(model, tmp_path / "model.onnx")
    encoder = EncoderGraph(tmp_path / "model.onnx", "onnxruntime", threads=1)

    def grown(rows: int) -> float:
        np.testing.assert_array_equal(encoder(np.ones((rows, 1024, 1), np.float32)), [1] * rows)
        return (resident() - before) / 2**20

    before = resident()
    assert 20 < grown(8) < 100
    assert grown(40) < 100  # of 160 that the run took, beside what the first keeps


def test_what_loading_takes_beside_the_weights_is_given_back(tmp_path: Path) -> None:
    """96 MiB of weights, which are read, and then packed."""
    EncoderGraph(products(tmp_path, 1), "onnxruntime", threads=1)  # loads the runtime
    path = products(tmp_path, 24)
    before = resident()
    encoder = EncoderGraph(path, "onnxruntime", threads=1)
    assert resident() - before < 1.15 * 96 * 2**20
    assert encoder(np.ones((1, 1024), np.float32)).shape == (1, 1024)


def products(folder: Path, times: int) -> Path:
    """A graph of products with as many weights of 4 MiB."""
    names = [f"value_{number}" for number in range(times + 1)]
    nodes = [
        helper.make_node("MatMul", [before, f"weight_{after}"], [after])
        for before, after in itertools.pairwise(names)
    ]
    weights = [
        numpy_helper.from_array(np.full((1024, 1024), number + 1, np.float32), f"weight_{name}")
        for number, name in enumerate(names[1:])
    ]
    first, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1024])
        for name in (names[0], names[-1])
    )
    graph = helper.make_graph(nodes, "products", [first], [last], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 10
    path = folder / f"{times}.onnx"
    onnx.save(model, path)
    return path


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    for runtime, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        with pytest.raises(RAdapterError, match=rf"{name} \d.* cannot load .*model.onnx: "):
            EncoderGraph(broken, runtime)
        monkeypatch.setitem(sys.modules, runtime, None)
        with pytest.raises(
            RAdapterError, match=rf"{name} is not installed .*pip install .*\[\w+\]"
        ):
            EncoderGraph(broken, runtime)
    with pytest.raises(RAdapterError, match="no runtime 'torch'; allowed are"):
        EncoderGraph(broken, "torch")


@pytest.mark.parametrize("asked", [None, "onnxruntime"])
def test_a_release_is_run_by_its_own_runtime(
    exported_tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    loaded = []
    copy = tmp_path / "repository"
    shutil.copytree(exported_tiny_clip / "model_repository" / "classify", copy / "classify")
    for folder in (copy / "classify").glob("[0-9]*"):
        dataclasses.replace(Release.load(folder), runtime="openvino").save(folder)

    def graph(path: Path, runtime: str, **how: Any) -> None:
        loaded.append((path.parent.parent.name, path.name, runtime, how["threads"]))

    monkeypatch.setattr(module, "EncoderGraph", graph)
    load_release(copy, runtime=asked, threads=3)
    assert loaded == [
        (name, "model.onnx", asked or "openvino", 3) for name in ("image_encoder", "text_encoder")
    ]


def test_openvino_reports_to_nobody_and_leaves_nothing_at_home(
    exported_tiny_clip: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from radapter_serve.encoders.encoder import"
        " EncoderGraph; EncoderGraph(Path(sys.argv[1]), 'openvino'); assert not [name for name,"
        " module in sys.modules.items() if name.startswith('openvino_telemetry') and module]"
    )
    path = exported_tiny_clip / "model_repository" / "image_encoder" / "2" / "model.onnx"
    command = [sys.executable, "-c", code, str(path)]
    subprocess.run(command, check=True, env={"HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_a_signal_after_openvino_is_handled(exported_tiny_clip: Path) -> None:
    """In a process of its own, which would die: the plugin's stacks for signals are freed in
    another order.
    """
    code = (
        "import os, signal, sys; from pathlib import Path; from radapter_serve.encoders.encoder"
        " import EncoderGraph;first, second = (EncoderGraph(Path(sys.argv[1]), 'openvino') for _ in"
        " range(2)); del first; del second;signal.signal(signal.SIGUSR1, lambda *_:"
        " print('handled')); os.kill(os.getpid(), signal.SIGUSR1)"
    )
    path = exported_tiny_clip / "model_repository" / "image_encoder" / "2" / "model.onnx"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
