"""`segment` on a real tritonserver against the same task in this process."""

from __future__ import annotations

import base64
import io
import re
import time
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from tritonclient.utils import InferenceServerException

from radapter_serve.clip.dense import encode_patches
from radapter_serve.encoders.needs import complete
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.tasks import segment as task
from radapter_serve.tasks.labels import Labels
from radapter_serve.tasks.segment import SegmentRequest
from tests.helpers.asking import connect, post, tensors
from tests.helpers.small_release import Local, png

pytestmark = pytest.mark.triton

CATS = [b"cat, kitty", b"dog", b"bird"]
NAMES = Labels([one.decode() for one in CATS])


def segment(client, version="", **values):
    result = client.infer("segment", tensors(**values), model_version=version)
    return (
        result.as_numpy("mask"),
        [name.decode() for name in result.as_numpy("label")],
        result.as_numpy("score"),
    )


def check(local: Local, served, request: SegmentRequest) -> None:
    expected = complete(task.segment(local.loaded, request))
    mask, labels, scores = served
    assert mask.dtype == np.uint16
    assert mask.shape == expected.mask.shape
    assert (mask != expected.mask).mean() < 1e-3  # rounding of the encoders' batches moves a tie
    assert labels == list(expected.labels)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.5},
        {"short_side": 40, "stride": 16, "refine": 2},
        {"templates": [b"one {}", b"two {}"]},
    ],
)
def test_served_equals_local(client, local, options):
    image = png(3, 70, 45)
    templates = options.get("templates")
    given = {name: value for name, value in options.items() if name != "templates"}
    if templates is not None:
        templates = [one.decode() for one in templates]
    request = SegmentRequest(image, Labels(NAMES.names, templates=templates), **given)
    check(local, segment(client, image=image, labels=CATS, **options), request)


@pytest.mark.parametrize("version", ["1", "2"])
def test_proposals(client, repository, version):
    local = Local(repository, int(version))
    image = png(3, 70, 45)
    masks = np.zeros((3, 45, 70), np.uint8)
    masks[0, :30] = 255
    masks[1, 20:] = 180
    masks[2, :, 40:] = 120
    scores = np.random.default_rng(0).random((3, 3), np.float32)
    check(
        local,
        segment(client, version, image=image, labels=CATS, proposals=masks),
        SegmentRequest(image, NAMES, proposals=masks),
    )
    served = segment(
        client,
        version,
        image=image,
        labels=CATS,
        proposals=masks,
        proposal_scores=scores,
        proposal_weight=0.25,
        threshold=0.3,
    )
    options: dict[str, Any] = {"proposal_weight": 0.25, "threshold": np.float32(0.3).item()}
    check(
        local,
        served,
        SegmentRequest(image, NAMES, proposals=masks, proposal_scores=scores, **options),
    )


def test_a_large_image(client, local):
    image = png(3, 3000, 2000, "JPEG")
    served = segment(client, image=image, labels=CATS, threshold=0.5)
    assert served[0].shape == (2000, 3000)
    check(local, served, SegmentRequest(image, NAMES, threshold=0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": b"nonsense", "labels": CATS}, r"\[invalid_image\] "),
        ({"image": png(0), "label_set": b"x"}, r"\[unknown_label_set\] .* there are: colours"),
        ({"image": png(0), "labels": CATS, "stride": 17}, r"\[invalid_argument\] stride is 17; 1"),
        ({"image": png(0), "labels": CATS, "version": "1"}, r"\[no_patch_encoder\] .*proposals"),
        (
            {"image": png(0), "labels": CATS, "proposals": np.zeros((0, 20, 30), np.uint8)},
            r"\[invalid_argument\] proposals has shape \[0, 20, 30\]",
        ),
    ],
)
def test_errors_reach_the_caller(client, values, message):
    with pytest.raises(InferenceServerException) as error:
        segment(client, **values)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert re.match(message, error.value.message())


def test_callers_who_give_up_do_not_hold_up_the_others(client):
    def encoded() -> int:
        return sum(
            stats.inference_count
            for stats in client.get_inference_statistics("patch_encoder").model_stats
        )

    before = encoded()
    values = tensors(image=png(0, 64, 64), labels=CATS, short_side=300, stride=14)  # 484 windows
    calls = [
        client.async_infer("segment", values, callback=lambda result, error: None)
        for _ in range(40)
    ]
    while encoded() == before:
        time.sleep(0.001)
    for call in calls:
        call.cancel()
    segment(client, image=png(0), labels=CATS)
    assert encoded() - before < 484 * 40


def test_json_over_http_as_curl_sends_it(server, local):
    path = "models/segment/infer"
    image = png(3, 30, 20)
    masks = np.zeros((1, 20, 30), np.uint8)
    masks[:, 5:15, 5:15] = 255
    image_input = {
        "name": "image",
        "shape": [1],
        "datatype": "BYTES",
        "data": [base64.b64encode(image).decode()],
    }
    labels = {
        "name": "labels",
        "shape": [3],
        "datatype": "BYTES",
        "data": [label.decode() for label in CATS],
    }
    threshold = {"name": "threshold", "shape": [1], "datatype": "FP32", "data": [0.5]}
    proposals = {
        "name": "proposals",
        "shape": [1, 20, 30],
        "datatype": "UINT8",
        "data": masks.ravel().tolist(),
    }
    options: dict[str, Any] = {"threshold": 0.5}
    for more, request in (
        ([], SegmentRequest(image, NAMES)),
        ([threshold], SegmentRequest(image, NAMES, **options)),
        ([threshold, proposals], SegmentRequest(image, NAMES, **options, proposals=masks)),
    ):
        status, answer = post(server, path, {"inputs": [image_input, labels, *more]})
        assert status == 200
        outputs = {output["name"]: output for output in answer["outputs"]}
        mask = np.array(outputs["mask"]["data"], np.uint16).reshape(outputs["mask"]["shape"])
        check(local, (mask, outputs["label"]["data"], np.array(outputs["score"]["data"])), request)
    status, answer = post(server, path, {"inputs": [{**image_input, "data": ["nonsense"]}, labels]})
    assert (status, answer["error"][:16]) == (400, "[invalid_image] ")


@torch.no_grad()
def test_an_export_serves_what_torch_computes(dense_tiny_clip):
    """One window over a square image, from the merged checkpoint by torch and open_clip alone."""
    name = f"local-dir:{dense_tiny_clip / 'merged'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    image = png(0, 40, 40)
    labels = ["cat", "a dog in the SNOW", "don't know", "猫"]
    texts = open_clip.get_tokenizer(name)([f"a photo of a {label}." for label in labels])
    patches = encode_patches(model, transform(Image.open(io.BytesIO(image)))[None], "naclip")
    cosines = (patches @ model.encode_text(texts, normalize=True).T).permute(0, 3, 1, 2)
    for side in (32, 40):  # of the window, and of the image
        cosines = interpolate(cosines, (side, side), mode="bilinear", align_corners=False)
    probabilities, expected = (40 * cosines[0]).softmax(0).max(0)
    with (
        TritonServer(
            ServerConfig(
                dense_tiny_clip / "model_repository", Endpoints.on_free_ports(), timeout=120
            )
        ) as server,
        connect(server) as client,
    ):
        names = np.array([label.encode() for label in labels], object)
        mask, found, scores = segment(client, image=image, labels=names, short_side=32)
    assert found == labels
    assert (mask != expected.numpy()).mean() < 0.01
    for index in range(len(labels)):
        values = probabilities[expected == index]
        assert scores[index] == pytest.approx(values.mean().item() if len(values) else 0, abs=1e-3)
