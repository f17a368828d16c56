"""What a config says of each runtime, and which runtime may serve: one that computes what torch
computed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.encoders.cuda import Gpu
from radapter_serve.encoders.onnxruntime import _load_cuda
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples
from radapter_serve.release.config import ServedEncoder, encoders_of
from radapter_serve.release.integrity import write_sums
from radapter_serve.server import runtime_choice as choice
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.installation import Installation, our_backends
from radapter_serve.server.runtime_choice import check_agreement
from radapter_serve.server.triton_server import TritonServer


def encoder(repository, name="image_encoder") -> ServedEncoder:
    [found] = [one for one in encoders_of(repository) if one.name == name]
    return found


@pytest.fixture
def own(repository, tmp_path):
    """A copy of the images' encoder, and of the task that has the releases: a test may change
    it.
    """
    for name in ("image_encoder", "classify"):
        shutil.copytree(repository / name, tmp_path / "repository" / name)
    return sealed(tmp_path / "repository")


def sealed(repository):
    """The same, with the digests of the files as they are now."""
    for version in (1, 2):
        write_sums(repository, version)
    return repository


def parameters(config) -> dict[str, str]:
    return {
        key: value.string_value
        for key, value in config.parameters.items()
        if not key.startswith("release")
    }


def parsed(text: str):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_encoders_are_found_with_their_versions(repository):
    found = {
        one.name: (one.versions, one.runtime, one.facts.precision, one.instances)
        for one in encoders_of(repository)
    }
    both = ([1, 2], "onnxruntime", "fp32", 1)
    assert found == {
        "image_encoder": both,
        "text_encoder": both,
        "patch_encoder": ([2], "onnxruntime", "fp32", 1),
    }


def test_models_of_others_are_left_alone_and_a_broken_config_is_said(own):
    (own / "other").mkdir()
    (own / "other" / "config.pbtxt").write_text('backend: "onnxruntime" of_tomorrow: 1')
    assert [one.name for one in encoders_of(own)] == ["image_encoder"]
    (own / "other" / "config.pbtxt").write_text("backend {")
    with pytest.raises(RAdapterError, match=r"other/config\.pbtxt is not a Triton model config: "):
        encoders_of(own)


def test_configs_of_each_runtime_and_the_way_back(repository):
    exported = encoder(repository)
    openvino = parsed(exported.configured("openvino", 3))
    assert (openvino.backend, openvino.default_model_filename) == ("openvino", "model.onnx")
    # Its official backend would pad each batch to max_batch_size rows.
    assert (openvino.max_batch_size, openvino.HasField("dynamic_batching")) == (0, False)
    assert (list(openvino.input[0].dims), list(openvino.output[0].dims)) == (
        [-1, 16, 16, 3],
        [-1, 8],
    )
    assert openvino.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    given = {"INFERENCE_NUM_THREADS": "3", "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    assert parameters(openvino) == given
    assert not openvino.optimization.execution_accelerators.gpu_execution_accelerator

    back = ServedEncoder(exported.folder, openvino, exported.facts).configured("onnxruntime", None)
    assert parsed(back) == exported.config

    plan = parsed(exported.configured("tensorrt", 3))
    assert (plan.backend, plan.default_model_filename, parameters(plan)) == (
        "tensorrt",
        "model.plan",
        {},
    )
    assert (plan.max_batch_size, plan.instance_group[0].kind) == (
        64,
        model_config_pb2.ModelInstanceGroup.KIND_GPU,
    )
    # Triton would put an instance on every GPU; the engine was built and checked on one.
    assert list(plan.instance_group[0].gpus) == [0]
    assert not plan.optimization.execution_accelerators.gpu_execution_accelerator
    back = parsed(
        ServedEncoder(exported.folder, plan, exported.facts).configured("onnxruntime", None)
    )
    assert back == exported.config
    [cuda] = back.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, dict(cuda.parameters)) == (
        "cuda",
        {"use_tf32": "0"},
    )  # fp32 is fp32, as it was checked


def test_openvino_is_asked_for_bf16_by_its_own_parameter(repository):
    exported = encoder(repository)
    bf16 = ServedEncoder(
        exported.folder, exported.config, replace(exported.facts, precision="bf16")
    )
    assert parameters(parsed(bf16.configured("openvino", None)))["HINT_BF16"] == "YES"
    assert "HINT_BF16" not in parameters(parsed(bf16.configured("onnxruntime", None)))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_that_computes_what_the_samples_say_is_right(repository, runtime):
    assert check_agreement(encoder(repository), runtime, 1) < 1e-6


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_onnxruntime_is_checked_where_triton_will_place_it(own, monkeypatch):
    monkeypatch.setattr(choice, "find_gpu", lambda: Gpu("NVIDIA A100", "8.0"))
    looked = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: looked.append("for CUDA"))
    _load_cuda.cache_clear()
    with pytest.raises(
        RAdapterError, match="GPU 0 was asked for; install onnxruntime-gpu .* KIND_CPU"
    ):
        check_agreement(encoder(own), "onnxruntime", 1)
    assert looked == ["for CUDA"]
    made = encoder(own)
    made.config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert check_agreement(made, "onnxruntime", 1) < 1e-6
    assert (
        parsed(made.configured("onnxruntime", 1)).instance_group[0].kind
        == made.config.instance_group[0].kind
    )
    assert check_agreement(made, "openvino", 1) < 1e-6


def test_a_runtime_needs_an_encoder(own):
    shutil.rmtree(own / "classify")
    (own / "image_encoder").rename(own / "other")
    (own / "other" / "config.pbtxt").write_text('backend: "python"')
    with pytest.raises(
        RAdapterError, match="holds no encoder of radapter-export; leave --runtime auto out"
    ):
        TritonServer(ServerConfig(own, Endpoints.on_free_ports(), runtime="auto")).start()


def test_a_runtime_that_differs_is_refused_with_the_way_out(own):
    folder = own / "image_encoder" / "1"
    samples = Samples.load(folder)
    Samples(samples.inputs, [-reference for reference in samples.references]).save(folder)
    message = "image_encoder of release 1, run by openvino on this machine, differs from torch"
    way_out = "; leave --runtime out .* or export for it: radapter-export --runtime openvino"
    with pytest.raises(RAdapterError, match=message):
        check_agreement(encoder(own), "openvino")
    with pytest.raises(RAdapterError, match=f"{message}.*{way_out}"):
        TritonServer(
            ServerConfig(sealed(own), Endpoints.on_free_ports(), runtime="openvino")
        ).start()
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(RAdapterError, match=rf"OpenVINO .* cannot load {graph}: .*\S{way_out}"):
        TritonServer(
            ServerConfig(sealed(own), Endpoints.on_free_ports(), runtime="openvino")
        ).start()


def test_a_runtime_is_held_to_the_cosine_of_the_export_too(own):
    config = own / "image_encoder" / "config.pbtxt"
    folder = own / "image_encoder" / "2"
    samples = Samples.load(folder)
    turned = [reference + 0.05 * np.roll(reference, 1, axis=-1) for reference in samples.references]
    turned = [reference / np.linalg.norm(reference, axis=-1, keepdims=True) for reference in turned]
    Samples(samples.inputs, turned).save(folder)
    for least, right in ((-1, True), (0.9, True), (0.99999, False)):
        exported = encoder(own)
        agreement = {"tolerance": 2, "min_cosine": least}  # no error is larger
        facts = replace(exported.facts, agreement=agreement).to_dict()
        exported.config.parameters["release"].string_value = json.dumps(facts)
        config.write_text(text_format.MessageToString(exported.config), encoding="utf-8")
        if right:
            assert check_agreement(encoder(own), "onnxruntime", 1) > 1e-5
        else:
            with pytest.raises(RAdapterError, match=r"1 - cosine up to .*\(and 1e-05\) is allowed"):
                check_agreement(encoder(own), "onnxruntime", 1)


def test_what_is_not_there_is_said_with_the_command_that_makes_it(own):
    message = r"model\.plan, which tensorrt needs, .* radapter-build-engine .*repository"
    with pytest.raises(RAdapterError, match=message):
        check_agreement(encoder(own), "tensorrt")
    with pytest.raises(RAdapterError, match=message):
        TritonServer(
            ServerConfig(sealed(own), Endpoints.on_free_ports(), runtime="tensorrt")
        ).start()
    (own / "image_encoder" / "2" / "model.onnx").unlink()
    with pytest.raises(
        RAdapterError,
        match=r"model\.onnx, which onnxruntime needs, does not exist; .*radapter-export",
    ):
        TritonServer(ServerConfig(sealed(own), Endpoints.on_free_ports())).start()


def test_releases_that_are_gone_are_said(repository, own):
    shutil.copytree(repository / "text_encoder", own / "text_encoder")
    for version in ("1", "2"):
        shutil.rmtree(own / "image_encoder" / version)
    for runtime in (None, "openvino", "auto"):
        with pytest.raises(
            RAdapterError,
            match=r"image_encoder lacks the releases that are to be served \(.*\); run: radapter-e",
        ):
            TritonServer(
                ServerConfig(sealed(own), Endpoints.on_free_ports(), runtime=runtime)
            ).start()


@pytest.mark.parametrize(
    ("on_gpu", "quantization", "order"),
    [
        (True, None, ["tensorrt", "onnxruntime", "openvino"]),
        (False, None, ["openvino", "onnxruntime"]),
        (False, {"kind": "static"}, ["openvino", "onnxruntime"]),
        (False, {"kind": "dynamic"}, ["onnxruntime", "openvino"]),
    ],
)
def test_the_usual_order_of_runtimes(repository, on_gpu, quantization, order):
    exported = encoder(repository)
    facts = replace(exported.facts, quantization=quantization)
    assert choice.usual_order(replace(exported, facts=facts), on_gpu=on_gpu) == order


def test_auto_takes_the_first_that_is_there_and_agrees(own, monkeypatch):
    def chosen(backends):
        installation = Installation(own, backends)
        return choice.configure(own, [], "auto", 2, installation, lambda line: None)

    backends = our_backends()
    configured = chosen(backends)
    assert (configured.runtime, configured.checked) == ("openvino", {"image_encoder"})
    assert parsed(configured.configs["image_encoder"]).backend == "openvino"
    assert chosen({"onnxruntime": backends["onnxruntime"]}).runtime == "onnxruntime"

    real = choice.check_agreement

    def only_onnxruntime(encoder, runtime, threads):
        if runtime != "onnxruntime":
            raise RAdapterError("no kernel")
        return real(encoder, runtime, threads)

    monkeypatch.setattr(choice, "check_agreement", only_onnxruntime)
    assert chosen(backends).runtime == "onnxruntime"
    with pytest.raises(RAdapterError, match="no runtime can run all encoders: no kernel"):
        chosen({"openvino": backends["openvino"]})
