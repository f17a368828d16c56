"""The Python backends where no real server gets: a GPU that is not there, a wrong config, numpy
2.
"""

from __future__ import annotations

import contextlib
import json
import re
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest

from radapter_serve.encoders.runtimes import load_graph, openvino_properties
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples
from radapter_serve.server.launch import OUR_BACKENDS
from tests.helpers import fake_triton
from tests.helpers.fake_triton import Request


@pytest.fixture
def load(monkeypatch):
    """Import a backend as Triton does, with a stand-in for Triton's module."""
    fake_triton.install(monkeypatch)
    return lambda backend: fake_triton.load(OUR_BACKENDS[backend] / "model.py")


def embeds_of(responses):
    """The one output of each response."""
    return [array for response in responses for array in response.outputs().values()]


def arguments(repository, model="image_encoder", kind="CPU", **config):
    source, target = {
        "image_encoder": ("image", "image_embeds"),
        "text_encoder": ("tokens", "text_embeds"),
    }[model]
    whole = {
        "max_batch_size": 64,
        "input": [{"name": source, "data_type": "not read"}],
        "output": [{"name": target, "data_type": "TYPE_FP32"}],
        "parameters": {"release": {"string_value": "{}"}},
        **config,
    }
    return {
        "model_config": json.dumps(whole),
        "model_name": model,
        "model_repository": str(repository / model),
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
    }


both = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])


@both
def test_requests_are_answered_together_and_alone(load, repository, backend):
    samples = Samples.load(repository / "image_encoder" / "1")
    requests = [Request(image=values) for values in samples.inputs]
    for max_batch_size in (64, 0):
        model = load(backend)
        model.initialize(arguments(repository, max_batch_size=max_batch_size))
        for embeds, reference in zip(
            embeds_of(model.execute(requests)), samples.references, strict=True
        ):
            np.testing.assert_allclose(embeds, reference, atol=1e-6)
        model.finalize()


@both
def test_a_bad_request_fails_alone(load, repository, backend):
    model = load(backend)
    model.initialize(arguments(repository, "text_encoder"))
    good = Request(tokens=np.array([[1, 2]], np.int32))
    bad = Request(tokens=np.array([[[1, 2]]], np.int32))
    first, error, last = model.execute([good, bad, good])
    assert [embeds.shape for embeds in embeds_of([first, last])] == [(1, 8)] * 2
    assert re.match(r"\[\w+\] (onnxruntime|openvino): ", error.error())


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
@both
def test_a_gpu_that_is_not_there_is_refused(load, repository, backend):
    with pytest.raises(
        RAdapterError, match="uses CPUExecutionProvider where GPU 0|runs on the CPU"
    ):
        load(backend).initialize(arguments(repository, kind="GPU"))


def test_runtimes_heed_the_parameters_of_the_official_backends(repository, monkeypatch):
    properties = openvino_properties({"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"})
    assert properties["INFERENCE_NUM_THREADS"] == "1"
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"  # also on a processor with bf16
    assert openvino_properties({"HINT_BF16": "YES"})["INFERENCE_PRECISION_HINT"] == "bf16"
    session = Mock()
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    graph = repository / "image_encoder" / "1" / "model.onnx"
    with contextlib.suppress(Exception):  # of a session that is none
        load_graph(graph, "onnxruntime", {"intra_op_thread_count": "1"})
    [options] = [one for one in session.call_args.args if hasattr(one, "intra_op_num_threads")]
    assert options.intra_op_num_threads == 1
