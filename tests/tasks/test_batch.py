"""Triton's models with a stand-in for Triton: bad requests among good ones, and a missing GPU."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest
from google.protobuf.json_format import MessageToJson

from radapter_export.repository import sources
from radapter_serve.encoders.runtimes import load_graph, openvino_properties
from radapter_serve.errors import RAdapterError
from radapter_serve.process import SURPLUS
from radapter_serve.release.agreement import Samples
from radapter_serve.release.config import read_config
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import CONFIG
from radapter_serve.server.launch import OUR_BACKENDS
from tests.helpers.asking import needs_triton
from tests.helpers.fake_triton import Request, Response, Tensor, TritonError, install, load
from tests.helpers.small_release import png, png_header
from tests.tasks.test_request_alpha import Turned

pytestmark = needs_triton
# Of each model a right request, and wrong ones with the code that callers get.
CASES: dict[str, tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    "embed_text": (
        {"text": [[b"a cat"]]},
        [
            ({}, "invalid_argument"),
            ({"text": [[b"\xff"]]}, "invalid_argument"),
            ({"text": [[b"a"]], "alpha": np.array([[np.nan]], np.float32)}, "invalid_argument"),
        ],
    ),
    "classify": (
        {"image": [[png(7)]], "labels": [[b"cat", b"dog"]]},
        [
            ({"image": [[png(7)]]}, "no_labels"),
            ({"image": [[png(7)]], "label_set": [[b"nothing"]]}, "unknown_label_set"),
            ({"image": [[png_header(60_000, 60_000)]], "labels": [[b"a"]]}, "image_too_large"),
            ({"image": [[png(7)], [b"nonsense"]], "labels": [[b"a"]] * 2}, "invalid_image"),
        ],
    ),
    "segment": (
        {"image": [png(7)], "labels": [b"cat", b"dog"]},
        [
            ({"image": [b"nonsense"], "labels": [b"a"]}, "invalid_image"),
            ({"image": [png(7)], "label_set": [b"nothing"]}, "unknown_label_set"),
        ],
    ),
}


@pytest.fixture
def model(repository, local, monkeypatch):
    """A model.py of the repository, whose encoders run in this process."""
    encoders = {
        "image_encoder": ("image_embeds", local.images),
        "text_encoder": ("text_embeds", local.tokens),
        "patch_encoder": ("patch_embeds", local.patches),
    }

    def encode(name: str, inputs: list[np.ndarray]) -> Response:
        output, run = encoders[name]
        return Response([Tensor(output, run(*inputs))])

    install(monkeypatch, encode)

    def make(name: str) -> Any:
        instance = load(sources() / name / "model.py")
        config = read_config(repository / name / CONFIG)
        instance.initialize(
            {
                "model_repository": str(repository / name),
                "model_version": "2",
                "model_config": MessageToJson(config, preserving_proto_field_name=True),
            }
        )
        return instance

    return make


def assert_same(response: Response, expected_response: Response) -> None:
    assert response.error() == expected_response.error()
    if not response.has_error():
        for name, values in response.outputs().items():
            expected = expected_response.outputs()[name]
            if values.dtype == np.float32:
                np.testing.assert_allclose(values, expected, atol=1e-6)
            else:
                np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("name", CASES)
def test_good_requests_between_bad_ones_are_answered_as_alone(model, name, capfd):
    instance = model(name)
    good, bad = CASES[name]
    responses = instance.execute(
        [Request(**request) for wrong, _ in bad for request in (good, wrong)]
    )
    [expected] = instance.execute([Request(**good)])
    for response in responses[::2]:
        assert_same(response, expected)
    for response, (wrong, code) in zip(responses[1::2], bad, strict=True):
        [single_response] = instance.execute([Request(**wrong)])
        assert_same(response, single_response)
        assert str(response.error()).startswith(f"[{code}] ") and "\n" not in response.error()
        assert response.error().code == "INVALID_ARG"
    assert "Traceback" not in capfd.readouterr().err


def test_one_process_at_a_time_embeds_a_label_set_at_another_alpha(
    model, local, tmp_path, monkeypatch
):
    import fcntl

    from radapter_serve.tasks.table import TASKS

    monkeypatch.setenv(SURPLUS, str(tmp_path))
    instance = model("classify")
    turned = Turned(local)
    instance.loaded = turned.loaded
    instance._run = TASKS["classify"].make(turned.loaded, lambda: [], 0)

    def request(alpha: float) -> Request:
        at = np.array([[alpha]], np.float32)
        name = np.array([[b"colours"]], object)
        return Request(image=[[png(7)]], label_set=name, alpha=at)

    plain = Request(image=[[png(7)]], labels=[[b"cat", b"dog"]])
    with (tmp_path / "label-set.turn").open("wb") as other:  # another process
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not instance.execute([request(0.9)])[0].has_error()  # few prompts take no time
        monkeypatch.setattr("radapter_serve.tasks.table._FEW_PROMPTS", 2)
        refused, answered = instance.execute([request(0.6), plain])
    assert not answered.has_error()
    assert refused.error() == (
        "[overloaded] too many requests with label sets at another alpha; ask again later"
    )
    assert refused.error().code == "UNAVAILABLE"
    turned.calls.clear()
    responses = instance.execute([request(0.6), plain, request(0.7), request(0.6)])
    assert not any(response.has_error() for response in responses)
    assert_same(responses[0], responses[3])
    # Both sets of colours were embedded once, one after the other.
    texts = [round(alphas[0], 6) for alphas in turned.calls if len(alphas) == 3]
    with (tmp_path / "label-set.turn").open("wb") as other:  # what is cached needs no turn
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_same(instance.execute([request(0.6)])[0], responses[0])
    assert texts == [0.6, 0.7], turned.calls


HANGS = """
import threading, time
import pytest
from tests.helpers import fake_triton
fake_triton.install(pytest.MonkeyPatch())
from radapter_serve.triton import responses
responses.HUNG = 0.5
requests = [fake_triton.Request(text=[["a"]])]
answered = responses.answer(requests, lambda some: [{} for _ in some])
time.sleep(0.8)
print(len(answered), flush=True)
responses.answer(requests, lambda some: threading.Event().wait())
"""


def test_the_process_of_a_task_imports_no_library_of_the_other_end() -> None:
    """A server has a process for each task, release and instance."""
    code = (
        "import sys, types\n"
        "sys.modules['triton_python_backend_utils'] = types.ModuleType('pb')\n"
        "import radapter_serve.triton.task_model\n"
        "heavy = {'grpc', 'google.protobuf', 'pydantic', 'pyarrow', 'faiss', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_a_release_of_version_1_0_0_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    path = tmp_path / "model.py"
    path.write_text(f"from radapter_serve.triton.models.{name} import TritonPythonModel\n")
    assert type(load(path)).__module__ == "radapter_serve.triton.task_model"


def test_a_call_that_hangs_ends_its_process_with_a_traceback() -> None:
    command = [sys.executable, "-c", HANGS]
    process = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stdout) == (1, "1\n")
    assert "in answer" in process.stderr and "in wait" in process.stderr


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("Failed to increase the shared memory pool size for key '/x7_1' to 9", "[overloaded] ima"),
        ("Stub process 'image_encoder_0_0' is not healthy.", "[restarting] image_encoder is being"),
        ("no /home/me/file.onnx here", "[encoder_failed] image_encoder version 2 failed: no ... h"),
    ],
)
def test_errors_of_an_encoder_name_no_path_and_no_shared_memory(
    model, monkeypatch, message, answer
):
    install(monkeypatch, lambda name, inputs: Response(error=TritonError(message, "INTERNAL")))
    [response] = model("embed_image").execute([Request(image=[[png(7)]])])
    assert response.error().startswith(answer) and "/" not in response.error()
    retryable = re.match(r"\[(restarting|overloaded|server_stopping)\]", answer)
    assert (response.error().code == "UNAVAILABLE") == bool(retryable)


# Backends


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request, repository, monkeypatch):
    """Starts a backend with an encoder of the repository."""

    def start(name="image_encoder", kind="CPU", **config):
        source = "image" if name == "image_encoder" else "tokens"
        output = name.replace("encoder", "embeds")
        settings = {
            "backend": request.param,
            "max_batch_size": 64,
            "input": [{"name": source, "data_type": "not read"}],
            "output": [{"name": output, "data_type": "TYPE_FP32"}],
            "parameters": {"release": {"string_value": '{"tokenizer": {"context_length": 77}}'}},
            **config,
        }
        install(monkeypatch)
        model = load(OUR_BACKENDS[request.param] / "model.py")
        model.initialize(
            {
                "model_config": json.dumps(settings),
                "model_name": name,
                "model_repository": str(repository / name),
                "model_version": "1",
                "model_instance_kind": kind,
                "model_instance_device_id": "0",
            }
        )
        return model

    return start


@pytest.mark.parametrize("max_batch_size", [64, 0])
def test_requests_are_answered_together_and_alone(backend, repository, max_batch_size):
    samples = Samples.load(repository / "image_encoder" / "1")
    model = backend(max_batch_size=max_batch_size)
    responses = model.execute([Request(image=values) for values in samples.inputs])
    for response, reference in zip(responses, samples.references, strict=True):
        np.testing.assert_allclose(response.outputs()["image_embeds"], reference, atol=1e-6)
    model.finalize()


def test_tokens_that_no_text_has_are_refused_alone(backend):
    model = backend("text_encoder")
    rows: list[Any] = [[[[1, 2]]], [[]], [[1, -1, 3]], [[1] * 78]]
    if model.runtime == "onnxruntime":  # OpenVINO takes any number for a token
        rows.append([[1, 10**6, 3]])
    good = [[1, 2, 3]]
    tokens = [np.array(row, np.int32) for row in (good, *rows, good)]
    first, *refused, last = model.execute([Request(tokens=row) for row in tokens])
    assert_same(first, last)
    assert first.outputs()["text_embeds"].shape == (1, 8)
    for response in refused:
        assert re.match(r"\[(invalid_argument|encoder_failed)\] ", response.error())


@pytest.mark.parametrize("change", [{"input": []}, {"output": "embeds"}, {"input": "picture"}])
def test_a_config_with_other_names_than_the_graph_is_refused_at_load(backend, change):
    for kind, name in change.items():
        tensors = [{"name": name, "data_type": "TYPE_FP32"}] if name else []
        with pytest.raises(RAdapterError, match="the graph has image, image_embeds: export"):
            backend(**{kind: tensors})


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_gpu_that_is_not_there_is_refused(backend):
    message = "uses CPUExecutionProvider where GPU 0|runs on the CPU"
    with pytest.raises(RAdapterError, match=message):
        backend(kind="GPU")


def test_runtimes_follow_the_parameters_of_the_official_backends(repository, monkeypatch):
    properties = openvino_properties({"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"})
    assert properties["INFERENCE_NUM_THREADS"] == "1"
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"  # also on a processor with bf16
    assert openvino_properties({"HINT_BF16": "YES"})["INFERENCE_PRECISION_HINT"] == "bf16"
    session = Mock()
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    graph = repository / "image_encoder" / "1" / "model.onnx"
    with contextlib.suppress(Exception):  # of a session that is none
        load_graph(graph, "onnxruntime", {"intra_op_thread_count": "1"})
    [options] = [
        argument for argument in session.call_args.args if hasattr(argument, "intra_op_num_threads")
    ]
    assert options.intra_op_num_threads == 1
