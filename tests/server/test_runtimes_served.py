"""A release served by another runtime than it was exported for, on a real tritonserver."""

from __future__ import annotations

import numpy as np
import pytest

from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import connect, tensor
from tests.helpers.small_release import Local, png

pytestmark = pytest.mark.triton


def test_the_same_answers_by_openvino_in_any_version(repository, tmp_path):
    for name in (
        "image_encoder",
        "text_encoder",
        "embed_image",
    ):  # without `classify`, which has the releases
        (tmp_path / name).symlink_to(repository / name)
    server = TritonServer(
        ServerConfig(tmp_path, Endpoints.on_free_ports(), runtime="openvino", threads=2)
    )
    with server, connect(server) as client:
        for name in ("image_encoder", "text_encoder"):
            config = client.get_model_config(name, as_json=True)["config"]
            assert config["backend"] == "openvino"
            assert config["parameters"]["INFERENCE_NUM_THREADS"] == {"string_value": "2"}
        images = [png(0), png(1)]
        tokens = np.array([[1, 2, 3, 0], [4, 5, 6, 7]], np.int32)
        for number in ("1", "2"):
            local = Local(repository, int(number))
            embeds = local.loaded.embed_pixels([local.loaded.pixels(one) for one in images])
            found = client.infer(
                "embed_image", [tensor("image", [[i] for i in images])], model_version=number
            )
            np.testing.assert_allclose(found.as_numpy("image_embeds"), embeds, atol=1e-6)
            found = client.infer("text_encoder", [tensor("tokens", tokens)], model_version=number)
            np.testing.assert_allclose(
                found.as_numpy("text_embeds"), local.tokens(tokens), atol=1e-6
            )
