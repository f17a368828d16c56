"""A real export, served, against the merged checkpoint in open_clip: its own transform, tokenizer
and model.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from radapter_export import ExportSettings, export_release
from radapter_serve.adapter import save_adapter
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import connect, tensor
from tests.helpers.small_models import make_base, random_adapter
from tests.helpers.small_release import png

pytestmark = pytest.mark.triton

LABELS = ["cat", "a dog in the SNOW", "don't know", "猫"]


@pytest.fixture(scope="module")
def exported_siglip(tmp_path_factory) -> Path:
    """What a server has to do otherwise for a SigLIP: squashed images, texts of one length,
    sigmoids with a bias.
    """
    folder = tmp_path_factory.mktemp("siglip")
    name = make_base("siglip", folder / "base")
    save_adapter(random_adapter(name), folder / "adapter.safetensors")
    export_release(
        folder,
        [0.7],
        ExportSettings(model_repository=folder / "model_repository", merged=folder / "merged"),
    )
    return folder


@pytest.mark.parametrize("exported", ["exported_tiny_clip", "exported_siglip"])
@torch.no_grad()
def test_served_equals_open_clip(exported, request):
    folder = request.getfixturevalue(exported)
    newest = sorted(path.parent for path in folder.glob("merged/**/open_clip_config.json"))[-1]
    name = f"local-dir:{newest}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenize = open_clip.get_tokenizer(name)
    images = [png(0, 50, 41), png(1, 33, 90, kind="JPEG"), png(2, 20, 20, kind="WEBP")]
    pixels = torch.stack([transform(Image.open(io.BytesIO(image))) for image in images])
    image_embeds = model.encode_image(pixels, normalize=True)
    text_embeds = model.encode_text(
        tokenize([f"a photo of a {label}." for label in LABELS]), normalize=True
    )
    logits = model.logit_scale.exp() * image_embeds @ text_embeds.T
    scores = (
        logits.softmax(-1) if model.logit_bias is None else (logits + model.logit_bias).sigmoid()
    ).numpy()

    with (
        TritonServer(
            ServerConfig(folder / "model_repository", Endpoints.on_free_ports())
        ) as server,
        connect(server) as client,
    ):
        tasks = ["classify", "embed_image", "embed_text"]
        assert list(server.models) == [
            *tasks,
            "image_encoder",
            "retrieve",
            "segment",
            "text_encoder",
        ]
        image = tensor("image", [[data] for data in images])
        found = client.infer("embed_image", [image]).as_numpy("image_embeds")
        np.testing.assert_allclose(found, image_embeds, atol=1e-5)
        texts = tensor("text", [[f"a photo of a {label}.".encode()] for label in LABELS])
        found = client.infer("embed_text", [texts]).as_numpy("text_embeds")
        np.testing.assert_allclose(found, text_embeds, atol=1e-5)
        found = client.infer(
            "classify", [image, tensor("labels", [[label.encode() for label in LABELS]] * 3)]
        )
        for row, (names, values) in enumerate(
            zip(found.as_numpy("label"), found.as_numpy("score"), strict=True)
        ):
            best = np.argsort(-scores[row])
            assert [name.decode() for name in names] == [LABELS[index] for index in best]
            np.testing.assert_allclose(values, scores[row][best], rtol=1e-3)
