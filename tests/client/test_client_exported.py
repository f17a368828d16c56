"""A real export behind a real server: what the client gets is what open_clip gives here for the
same PIL image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from radapter_client import Client
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer

pytestmark = pytest.mark.triton

LABELS = ["cat, kitty", "a dog in the SNOW", "don't know", "猫"]


@pytest.fixture(scope="module")
def server(exported_tiny_clip: Path) -> Iterator[TritonServer]:
    models = exported_tiny_clip / "model_repository"
    with TritonServer(ServerConfig(models, Endpoints.on_free_ports())) as server:
        yield server


@pytest.fixture
def url(server: TritonServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, batch_size=3) as client:
        yield client


def pictures() -> list[Image.Image]:
    """Of every mode that can be sent, some upright, some wide, some smaller than the model's
    input.
    """
    random = np.random.default_rng(0)
    rgba = Image.fromarray(random.integers(0, 256, (70, 41, 4), np.uint8))
    rgb = rgba.convert("RGB")
    modes = [rgb, rgba, rgba.convert("LA"), rgb.convert("L"), rgb.convert("1"), rgb.quantize(200)]
    return [*modes, rgb.transpose(Image.Transpose.ROTATE_90), rgb.resize((20, 9))]


def test_photographs_are_turned(client: Client, tmp_path: Path):
    """A file, its bytes and Pillow's image of it are embedded as the upright image is, for each
    EXIF orientation.
    """
    assert client.release().exif_orientation
    upright = pictures()[0]
    for value in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        path = tmp_path / f"{value}.png"
        upright.save(path, exif=exif)
        with Image.open(path) as opened:
            turned = ImageOps.exif_transpose(opened)
            embeds = client.embed_images(
                [turned, path, path.read_bytes(), opened, opened.convert("RGB"), upright]
            )
        np.testing.assert_allclose(embeds[:5], embeds[[0] * 5], atol=1e-5)
        assert not np.allclose(embeds[0], embeds[5], atol=1e-3)
        whole = np.ones((1, *turned.size[::-1]), bool)
        found = client.segment(path, LABELS, proposals=whole)
        assert (
            found.mask.shape == whole.shape[1:] and found.overlay(legend=False).size == turned.size
        )


def test_segment_proposals(client: Client):
    """A mask of the whole of a square image is that image: it gets the label that `classify`
    gives.
    """
    image = pictures()[0].crop((0, 0, 40, 40))
    whole = np.ones((1, 40, 40), bool)
    best = client.classify(image, LABELS, top_k=1)
    found = client.segment(image, LABELS, proposals=whole)
    assert found.labels == ["cat", *LABELS[1:], "background"]
    assert found.release == client.release().version
    assert found.labels[int(found.mask[0, 0])] == best.top and len(np.unique(found.mask)) == 1
    assert max(found.scores) == pytest.approx(best.scores[0], rel=1e-3)
    half = whole.copy()
    half[:, :, 20:] = False
    split = client.segment(image, label_set="four", proposals=half, threshold=0.0)
    assert split.labels[-1] == "background" and split.background == 4
    assert (split.mask[:, 20:] == 4).all() and (split.mask[:, :20] < 4).all()
    assert split.overlay().width == 520
    fused = client.segment(
        image, LABELS, proposals=whole, proposal_scores=[[0, 0, 0, 1]], proposal_weight=0.5
    )
    assert (fused.mask == 3).all()
