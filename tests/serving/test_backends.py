"""The Python backends where no real server gets: a GPU that is not there, a wrong config, numpy 2."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tensorrt import Driver, install

from radapter_serve.release.agreement import Samples
from radapter_serve.runtimes.tensorrt.engine import Options, build
from radapter_serve.server.installation import OUR_BACKENDS


@pytest.fixture
def load(monkeypatch):
    """Import a backend as Triton does, with a stand-in for Triton's module."""
    stand_in = SimpleNamespace(
        triton_string_to_numpy=lambda _: np.float32,
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request[name]),
        Tensor=lambda name, array: array,
        TritonError=type("TritonError", (str,), {"INTERNAL": 1, "__new__": lambda cls, text, code: str(text)}),
        InferenceResponse=lambda tensors=None, error=None: tensors or error,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.delitem(sys.modules, "radapter_serve.server.backend", raising=False)

    def load(backend):
        spec = importlib.util.spec_from_file_location("backend", OUR_BACKENDS / backend / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.TritonPythonModel()

    return load


def arguments(repository, model="image_encoder", kind="CPU", **config):
    source, target = {"image_encoder": ("image", "image_embeds"), "text_encoder": ("tokens", "text_embeds")}[model]
    whole = {
        "max_batch_size": 64,
        "input": [{"name": source, "data_type": "not read"}],
        "output": [{"name": target, "data_type": "TYPE_FP32"}],
        "parameters": {"release": {"string_value": "{}"}},
        **config,
    }
    return {
        "model_config": json.dumps(whole),
        "model_repository": str(repository / model),
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
    }


both = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])


@both
def test_requests_are_answered_together_and_alone(load, repository, backend):
    samples = Samples.load(repository / "image_encoder" / "1")
    requests = [{"image": values} for values in samples.inputs]
    for max_batch_size in (64, 0):
        model = load(backend)
        model.initialize(arguments(repository, max_batch_size=max_batch_size))
        for [embeds], reference in zip(model.execute(requests), samples.references, strict=True):
            np.testing.assert_allclose(embeds, reference, atol=1e-6)
        model.finalize()


def parameters(**values):
    return {name: {"string_value": value} for name, value in values.items()}


def test_onnxruntime_heeds_the_parameters_of_the_official_backend(load, repository, monkeypatch):
    import onnxruntime

    seen, real = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kw: seen.append(real(*args, **kw)) or seen[-1])
    load("onnxruntime").initialize(arguments(repository, parameters=parameters(intra_op_thread_count="1")))
    assert seen[0].get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize(("hint", "precision"), [({}, "f32"), ({"HINT_BF16": "YES"}, "bf16")])
def test_openvino_heeds_the_parameters_of_the_official_backend(load, repository, monkeypatch, hint, precision):
    import openvino

    seen, real = {}, openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core,
        "compile_model",
        lambda core, path, device, how: seen.update(how) or real(core, path, device, how),
    )
    given = parameters(INFERENCE_NUM_THREADS="1", NUM_STREAMS="1", PERFORMANCE_HINT="LATENCY", **hint)
    load("openvino").initialize(arguments(repository, parameters=given))
    assert (seen["INFERENCE_NUM_THREADS"], seen["INFERENCE_PRECISION_HINT"]) == ("1", precision)


@both
def test_a_bad_request_fails_alone(load, repository, backend):
    model = load(backend)
    model.initialize(arguments(repository, "text_encoder"))
    good = {"tokens": np.array([[1, 2]], np.int32)}
    bad = {"tokens": np.array([[[1, 2]]], np.int32)}
    first, error, last = model.execute([good, bad, good])
    assert first[0].shape == last[0].shape == (1, 8)
    assert error.startswith({"onnxruntime": "ONNX Runtime: ", "openvino": "OpenVINO: "}[backend])


def test_a_batch_that_fails_for_one_is_run_again_one_by_one(load, repository):
    model = load("onnxruntime")
    model.initialize(arguments(repository, "text_encoder"))
    good, bad = ({"tokens": np.array([[1, token]], np.int32)} for token in (2, 10**6))
    first, error, last = model.execute([good, bad, good])
    assert first[0].shape == last[0].shape == (1, 8)
    assert error.startswith("ONNX Runtime: ")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
@pytest.mark.parametrize(
    ("backend", "message"),
    [("onnxruntime", "fell back to CPUExecutionProvider without an error"), ("openvino", "OpenVINO runs on the CPU")],
)
def test_a_gpu_that_is_not_used_is_an_error(load, repository, backend, message):
    with pytest.raises(RuntimeError, match=message):
        load(backend).initialize(arguments(repository, kind="GPU"))


@both
def test_wrong_names_and_a_missing_file(load, repository, backend):
    with pytest.raises(RuntimeError, match=r"names the output \['x'\], the graph has \['image_embeds'\]"):
        load(backend).initialize(arguments(repository, output=[{"name": "x", "data_type": "TYPE_FP32"}]))
    with pytest.raises(RuntimeError, match=r"none\.onnx does not exist; export again: radapter-export"):
        load(backend).initialize(arguments(repository, default_model_filename="none.onnx"))


@both
def test_numpy_2_is_refused(load, repository, monkeypatch, backend):
    monkeypatch.setattr(np, "__version__", "2.0.1")
    with pytest.raises(RuntimeError, match=r"numpy 2\.0\.1 is installed"):
        load(backend).initialize(arguments(repository))


def test_tensorrt_runs_an_engine(load, repository, tmp_path, monkeypatch):
    trt = install(monkeypatch, Driver())
    folder = tmp_path / "image_encoder" / "1"
    folder.mkdir(parents=True)
    graph = repository / "image_encoder" / "1" / "model.onnx"
    folder.joinpath("model.plan").write_bytes(build(trt, graph, Options(), max_batch_size=64, max_length=77)[0])
    samples = Samples.load(graph.parent)
    model = load("tensorrt")
    model.initialize(arguments(tmp_path, kind="GPU", default_model_filename="model.plan"))
    answers = model.execute([{"image": values} for values in samples.inputs])
    for [embeds], reference in zip(answers, samples.references, strict=True):
        np.testing.assert_allclose(embeds, reference, atol=1e-6)
    with pytest.raises(RuntimeError, match="instance on the CPU: .*KIND_GPU"):
        load("tensorrt").initialize(arguments(tmp_path, default_model_filename="model.plan"))
