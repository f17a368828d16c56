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
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from radapter_serve.encoders import precision as module
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.loaded import load_release
from radapter_serve.encoders.precision import Choice
from radapter_serve.encoders.runtimes import session_options
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, Tolerance, compare
from radapter_serve.release.release import Release
from radapter_serve.release.repository import RUNTIMES


@pytest.mark.parametrize("name", ["image_encoder", "text_encoder"])
def test_openvino_computes_what_torch_computed(
    exported_tiny_clip: Path, name: str, tmp_path: Path
) -> None:
    folder = exported_tiny_clip / "model_repository" / name / "2"
    encoder = EncoderGraph(folder / "model.onnx", "openvino", threads=1)
    assert compare(name, encoder, Samples.load(folder), Tolerance(1e-5)).min_cosine > 1 - 1e-6
    # Weights in another file, as those above 2 GB are.
    apart = tmp_path / "apart.onnx"
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, apart, save_as_external_data=True, location="apart.data", size_threshold=0)
    encoder = EncoderGraph(apart, "openvino", threads=1)
    compare(name, encoder, Samples.load(folder), Tolerance(1e-5))


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("1.25.1", {"session.intra_op.allow_spinning": "0"}),
        ("1.26.0", {"session.intra_op.spin_duration_us": "20"}),
        ("2.0.0rc1", {"session.intra_op.spin_duration_us": "20"}),
    ],
)
def test_threads_spin_a_little_or_in_an_older_runtime_not_at_all(
    version: str, known: dict[str, str]
) -> None:
    parameters = {**RUNTIMES["onnxruntime"].parameters, "intra_op_thread_count": "2"}
    assert session_options(parameters, version) == known
    # A release of version 1.0.0 says not at all; its owner may say so by a time of 0.
    assert session_options({"session.intra_op.allow_spinning": "0"}, version) == known
    options = {"session.intra_op.spin_duration_us": "0"}
    assert version < "1.26" or session_options(options, version) == options


def test_the_installed_runtime_knows_its_options() -> None:
    """It ignores an option that it does not know, without a word."""
    library = max(Path(onnxruntime.__path__[0], "capi").glob("*pybind11_state*"))
    for option in session_options(RUNTIMES["onnxruntime"].parameters, onnxruntime.__version__):
        assert option.encode() in library.read_bytes()


def saved(path: Path, nodes: list[Any], shapes: list[Any], weights: dict[str, np.ndarray]) -> Path:
    """A graph from `x` to `y`, which have these shapes."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip("xy", shapes, strict=True)
    ]
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def test_the_memory_of_a_large_run_is_given_back(tmp_path: Path) -> None:
    """4 MiB between the layers for each row; what runs of 8 rows take stays for the next."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["y"], keepdims=0, axes=[1, 2]),
    ]
    shapes = [["batch", 1024, 1], ["batch"]]
    weights = {"weight": np.ones((1, 1024), np.float32)}
    encoder = EncoderGraph(saved(tmp_path / "model.onnx", nodes, shapes, weights), threads=1)

    def grown(rows: int) -> float:
        np.testing.assert_array_equal(encoder(np.ones((rows, 1024, 1), np.float32)), [1] * rows)
        return (resident() - before) / 2**20

    before = resident()
    assert 20 < grown(8) < 100
    assert grown(40) < 100  # of 160 that the run took, beside what the first keeps


def test_what_loading_takes_beside_the_weights_is_given_back(tmp_path: Path) -> None:
    """48 MiB of weights, which are read, and then packed."""

    def products(count: int) -> EncoderGraph:
        """Of weights of 4 MiB."""
        names = ["x", *(f"value_{number}" for number in range(1, count)), "y"]
        weights = {
            f"weight_{name}": np.full((1024, 1024), number, np.float32)
            for number, name in enumerate(names[1:], 1)
        }
        nodes = [
            helper.make_node("MatMul", [before, f"weight_{after}"], [after])
            for before, after in itertools.pairwise(names)
        ]
        path = saved(tmp_path / f"{count}.onnx", nodes, [["batch", 1024]] * 2, weights)
        before = resident()
        encoder = EncoderGraph(path, threads=1)
        assert count == 1 or resident() - before < 1.15 * 48 * 2**20
        return encoder

    products(1)  # loads the runtime
    assert products(12)(np.ones((1, 1024), np.float32)).shape == (1, 1024)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_broken_graph_and_a_missing_runtime_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    for runtime, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        with pytest.raises(RAdapterError, match=rf"{name} \d.* cannot load .*model.onnx: "):
            EncoderGraph(broken, runtime)
        monkeypatch.setitem(sys.modules, runtime, None)
        with pytest.raises(RAdapterError, match=f"{runtime} is not installed"):
            EncoderGraph(broken, runtime)


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
    load_release(copy, choice=Choice(asked), threads=3)
    assert loaded == [
        (name, "model.onnx", asked or "openvino", 3) for name in ("image_encoder", "text_encoder")
    ]


# The plugin's stacks for signals go in another order than they came, and the next signal would end
# the process.
OPENVINO = """
import os, signal, sys
from pathlib import Path
from radapter_serve.encoders.encoder import EncoderGraph
first, second = (EncoderGraph(Path(sys.argv[1]), "openvino") for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
assert not [name for name, module in sys.modules.items() if "openvino_telemetry" in name and module]
"""


def test_openvino_reports_to_nobody_and_leaves_signals_as_they_were(
    exported_tiny_clip: Path, tmp_path: Path
) -> None:
    path = exported_tiny_clip / "model_repository" / "image_encoder" / "2" / "model.onnx"
    command = [sys.executable, "-c", OPENVINO, str(path)]
    done = subprocess.run(
        command, env={"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
    assert not list(tmp_path.iterdir())
