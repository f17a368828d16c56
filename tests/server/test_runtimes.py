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

from radapter_serve.encoders.runtimes import cuda_provider
from radapter_serve.encoders.tensorrt import Gpu
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


ORT = "onnxruntime"


def parsed(text: str):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_models_of_others_are_left_alone_and_a_broken_config_is_named(own):
    [encoder] = encoders_of(own)
    assert (encoder.name, encoder.versions, encoder.runtime) == ("image_encoder", [1, 2], ORT)
    (own / "other").mkdir()
    (own / "other" / "config.pbtxt").write_text('backend: "onnxruntime" of_tomorrow: 1')
    assert len(encoders_of(own)) == 1
    (own / "other" / "config.pbtxt").write_text("backend {")
    with pytest.raises(RAdapterError, match=r"other/config\.pbtxt is not a Triton model config: "):
        encoders_of(own)


def test_configs_of_each_runtime_and_the_way_back(repository):
    exported = encoder(repository)
    kinds = model_config_pb2.ModelInstanceGroup
    openvino = parsed(exported.configured("openvino", 3))
    assert (openvino.backend, openvino.default_model_filename) == ("openvino", "model.onnx")
    # Its official backend would pad each batch to max_batch_size rows.
    assert (openvino.max_batch_size, openvino.HasField("dynamic_batching")) == (0, False)
    dims = list(openvino.input[0].dims), list(openvino.output[0].dims)
    assert dims == ([-1, 16, 16, 3], [-1, 8])
    assert openvino.instance_group[0].kind == kinds.KIND_CPU
    threads = {"INFERENCE_NUM_THREADS": "3", "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    assert parameters(openvino) == threads
    facts = replace(exported.facts, precision="bf16")
    bf16 = ServedEncoder(exported.folder, exported.config, facts)
    assert parameters(parsed(bf16.configured("openvino", None)))["HINT_BF16"] == "YES"

    plan = parsed(exported.configured("tensorrt", 3))
    assert (plan.backend, plan.default_model_filename) == ("tensorrt", "model.plan")
    assert (plan.max_batch_size, plan.instance_group[0].kind) == (64, kinds.KIND_GPU)
    # Triton would put an instance on every GPU; the engine was built and checked on one.
    assert list(plan.instance_group[0].gpus) == [0]

    for other in (openvino, plan):
        assert not other.optimization.execution_accelerators.gpu_execution_accelerator
        encoder_of = ServedEncoder(exported.folder, other, exported.facts)
        back = parsed(encoder_of.configured(ORT, None))
        assert back == exported.config
    [cuda] = back.optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(cuda.parameters) == {"use_tf32": "0"}  # fp32 is fp32, as it was checked


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_that_computes_what_the_samples_say_is_right(repository, runtime):
    assert check_agreement(encoder(repository), runtime, 1) < 1e-6


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_onnxruntime_is_checked_where_triton_will_place_it(own, monkeypatch):
    monkeypatch.setattr(choice, "find_gpu", lambda: Gpu("NVIDIA A100", "8.0"))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    cuda_provider.cache_clear()
    with pytest.raises(RAdapterError, match="GPU 0 was asked for; install onnxruntime-gpu"):
        check_agreement(encoder(own), ORT, 1)
    on_cpu = encoder(own)
    on_cpu.config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert check_agreement(on_cpu, ORT, 1) < 1e-6


def start(repository, runtime=None):
    config = ServerConfig(sealed(repository), Endpoints.on_free_ports(), runtime=runtime)
    TritonServer(config).start()


def test_a_runtime_that_differs_is_refused_with_the_way_out(own):
    folder = own / "image_encoder" / "1"
    samples = Samples.load(folder)
    Samples(samples.inputs, [-reference for reference in samples.references]).save(folder)
    way_out = "; leave --runtime out .* or export for it: radapter-export --runtime openvino"
    message = "image_encoder of release 1, run by openvino on this machine, differs from torch"
    with pytest.raises(RAdapterError, match=f"{message}.*{way_out}"):
        start(own, "openvino")
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(RAdapterError, match=rf"OpenVINO .* cannot load {graph}: .*\S{way_out}"):
        start(own, "openvino")


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


def test_a_missing_file_is_named_with_the_command_that_makes_it(own):
    with pytest.raises(RAdapterError, match=r"model\.plan, which .* radapter-build-engine"):
        start(own, "tensorrt")
    (own / "image_encoder" / "2" / "model.onnx").unlink()
    with pytest.raises(RAdapterError, match=r"model\.onnx, which .* radapter-export"):
        start(own)
    for version in ("1", "2"):
        shutil.rmtree(own / "image_encoder" / version)
    for runtime in (None, "openvino", "auto"):
        with pytest.raises(RAdapterError, match="image_encoder lacks the releases that are to be"):
            start(own, runtime)
    shutil.rmtree(own / "classify")
    (own / "image_encoder").rename(own / "other")
    (own / "other" / "config.pbtxt").write_text('backend: "python"')
    (own / "other" / "1").mkdir()
    with pytest.raises(RAdapterError, match="holds no encoder of radapter-export; leave --runtime"):
        TritonServer(ServerConfig(own, Endpoints.on_free_ports(), runtime="auto")).start()


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
