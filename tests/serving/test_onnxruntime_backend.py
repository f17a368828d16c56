"""The Python `onnxruntime` backend where no real server gets: a GPU that is not there, a wrong config, numpy 2."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from radapter_serve.serving.server import OUR_BACKENDS


@pytest.fixture
def load(monkeypatch):
    """Import the backend as Triton does, with a stand-in for Triton's module."""
    stand_in = SimpleNamespace(
        triton_string_to_numpy=lambda _: np.float32,
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request[name]),
        Tensor=lambda name, array: array,
        TritonError=type("TritonError", (str,), {"INTERNAL": 1, "__new__": lambda cls, text, code: str(text)}),
        InferenceResponse=lambda tensors=None, error=None: tensors or error,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)

    def load():
        spec = importlib.util.spec_from_file_location("backend", OUR_BACKENDS / "onnxruntime" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.TritonPythonModel()

    return load


def arguments(repository, kind="CPU", **config):
    whole = {
        "max_batch_size": 64,
        "input": [{"name": "image", "data_type": "TYPE_UINT8"}],
        "output": [{"name": "image_embeds", "data_type": "TYPE_FP32"}],
        "parameters": {"intra_op_thread_count": {"string_value": "1"}, "release": {"string_value": "{}"}},
        **config,
    }
    return {
        "model_config": json.dumps(whole),
        "model_repository": str(repository / "image_encoder"),
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
    }


def test_it_loads_with_the_parameters_of_the_official_backend(load, repository):
    model = load()
    model.initialize(arguments(repository))
    assert model._session.get_session_options().intra_op_num_threads == 1


def test_a_bad_request_fails_alone(load, repository):
    model = load()
    given = arguments(
        repository,
        input=[{"name": "tokens", "data_type": "TYPE_INT32"}],
        output=[{"name": "text_embeds", "data_type": "TYPE_FP32"}],
    )
    model.initialize({**given, "model_repository": str(repository / "text_encoder")})
    good, bad = ({"tokens": np.array([[1, token]], np.int32)} for token in (2, 10**6))
    first, error, last = model.execute([good, bad, good])
    assert first[0].shape == last[0].shape == (1, 8)
    assert error.startswith("ONNX Runtime: ")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_silent_fall_back_to_the_cpu_is_an_error(load, repository):
    with pytest.raises(RuntimeError, match="fell back to CPUExecutionProvider without an error"):
        load().initialize(arguments(repository, "GPU"))


def test_wrong_names_and_a_missing_file(load, repository):
    with pytest.raises(RuntimeError, match=r"names the output \['x'\], the graph has \['image_embeds'\]"):
        load().initialize(arguments(repository, output=[{"name": "x", "data_type": "TYPE_FP32"}]))
    with pytest.raises(RuntimeError, match=r"none\.onnx does not exist; export again: radapter-export"):
        load().initialize(arguments(repository, default_model_filename="none.onnx"))


def test_numpy_2_is_refused(load, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.0.1")
    with pytest.raises(RuntimeError, match=r"numpy 2\.0\.1 is installed"):
        load()
