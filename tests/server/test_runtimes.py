"""The choice of a runtime: only one that computes what torch computed may serve."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from tritonclient.grpc import model_config_pb2

from radapter_serve.encoders import precision
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.precision import Choice, choose
from radapter_serve.encoders.runtimes import cuda_provider
from radapter_serve.encoders.tensorrt import Gpu
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Agreements, Samples
from radapter_serve.release.config import ServedEncoder, encoders_of, read_config
from radapter_serve.server import models
from radapter_serve.server.models import check_agreement
from tests.helpers.asking import connect, tensor, tritonserver
from tests.helpers.small_release import Local, png, seal


def encoder(repository, name="image_encoder") -> ServedEncoder:
    [encoder] = [candidate for candidate in encoders_of(repository) if candidate.name == name]
    return encoder


@pytest.fixture
def models_copy(repository, tmp_path):
    """A copy of what has the releases, which a test may change."""
    for name in ("image_encoder", "text_encoder", "classify"):
        shutil.copytree(repository / name, tmp_path / "repository" / name)
    seal(tmp_path / "repository", 1, 2)
    return tmp_path / "repository"


ORT = "onnxruntime"


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_onnxruntime_is_checked_where_triton_will_place_it(models_copy, monkeypatch):
    monkeypatch.setattr(models, "find_gpu", lambda: Gpu("NVIDIA A100", "8.0"))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    cuda_provider.cache_clear()
    device = models.device_of(models_copy, [1])
    with pytest.raises(RAdapterError, match="GPU 0 was asked for; install onnxruntime-gpu"):
        choose(models_copy, [1], ORT, None, 1, device=device, compared=True)
    path = models_copy / "image_encoder" / "1" / "config.pbtxt"
    config = read_config(models_copy / "image_encoder" / "config.pbtxt")
    config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
    path.write_text(str(config))
    (models_copy / "image_encoder" / "config.pbtxt").write_text(str(config))
    assert models.device_of(models_copy, [1]) is None


def start(repository, runtime=None):
    seal(repository, 1, 2)
    tritonserver(repository, runtime=runtime).start()


def test_a_runtime_that_differs_is_refused_with_the_way_out(models_copy):
    folder = models_copy / "image_encoder" / "1"
    samples = Samples.load(folder)
    Samples(samples.inputs, [-reference for reference in samples.references]).save(folder)
    way_out = "; leave --runtime out .* or export for it: radapter-export --runtime openvino"
    message = "image_encoder of release 1 in fp32 with openvino differs from torch"
    with pytest.raises(RAdapterError, match=f"{message}.*{way_out}"):
        start(models_copy, "openvino")


def test_a_runtime_is_held_to_the_cosine_of_the_export_too(models_copy):
    folder = models_copy / "image_encoder" / "2"
    samples = Samples.load(folder)
    turned = [reference + 0.05 * np.roll(reference, 1, axis=-1) for reference in samples.references]
    turned = [reference / np.linalg.norm(reference, axis=-1, keepdims=True) for reference in turned]
    Samples(samples.inputs, turned).save(folder)
    graph = EncoderGraph(folder / "model.onnx")
    exported = encoder(models_copy)

    def check(least: float) -> None:
        agreement = Agreements(batches=[], tolerance=2, min_cosine=least)  # no error is larger
        facts = replace(exported.facts, agreement=agreement)
        check_agreement(replace(exported, facts=facts), 2, graph)

    check(0.9)
    with pytest.raises(RAdapterError, match=r"1 - cosine up to .*\(and 1e-05\) is allowed"):
        check(0.99999)


def test_a_missing_file_is_named_with_the_command_that_makes_it(models_copy):
    with pytest.raises(RAdapterError, match=r"model\.plan, which .* radapter-build-engine"):
        start(models_copy, "tensorrt")
    (models_copy / "image_encoder" / "2" / "model.onnx").unlink()
    with pytest.raises(RAdapterError, match=r"model\.onnx, which .* radapter-export"):
        start(models_copy, "openvino")
    for version in ("1", "2"):
        shutil.rmtree(models_copy / "image_encoder" / version)
    for runtime in (None, "openvino", "auto"):
        with pytest.raises(RAdapterError, match="image_encoder lacks the releases that are to be"):
            start(models_copy, runtime)
    shutil.rmtree(models_copy / "classify")
    (models_copy / "image_encoder").rename(models_copy / "other")
    (models_copy / "other" / "config.pbtxt").write_text('backend: "python"')
    (models_copy / "other" / "1").mkdir()
    with pytest.raises(RAdapterError, match="holds no release; leave --runtime"):
        tritonserver(models_copy, runtime="auto").start()


def test_auto_takes_the_first_that_agrees(models_copy, monkeypatch):
    def only(able, tried):
        def attempt(_, releases, runtime, *options):
            tried.append(runtime)
            if runtime != able:
                raise RAdapterError(f"no {runtime}")
            return Choice(runtime)

        return attempt

    for order, on_gpu in ((["openvino", ORT], False), (["tensorrt", ORT, "openvino"], True)):
        for number, able in enumerate(order):
            tried: list[str] = []
            monkeypatch.setattr(precision, "try_encoders", only(able, tried))
            assert choose(models_copy, [2], "auto", None, 2, on_gpu=on_gpu).runtime == able
            assert tried == order[: number + 1]
    monkeypatch.setattr(precision, "try_encoders", only("none", []))
    with pytest.raises(RAdapterError, match="run all encoders: no openvino; no onnxruntime"):
        choose(models_copy, [2], "auto", None, 2)


@pytest.mark.triton
def test_the_same_answers_by_openvino_in_any_version(repository):
    server = tritonserver(repository, runtime="openvino", threads=2)
    with server, connect(server) as client:
        config = client.get_model_config("image_encoder", as_json=True)["config"]
        assert config["backend"] == "openvino"
        images = [png(0), png(1)]
        tokens = np.array([[1, 2, 3, 0], [4, 5, 6, 7]], np.int32)
        for number in ("1", "2"):
            local = Local(repository, int(number))
            embeds = local.loaded.embed_pixels([local.loaded.pixels(image) for image in images])
            answer = client.infer(
                "embed_image", [tensor("image", [[i] for i in images])], model_version=number
            )
            np.testing.assert_allclose(answer.as_numpy("image_embeds"), embeds, atol=1e-6)
            answer = client.infer("text_encoder", [tensor("tokens", tokens)], model_version=number)
            np.testing.assert_allclose(
                answer.as_numpy("text_embeds"), local.tokens(tokens), atol=1e-6
            )
