"""A real export behind a real server: what the client gets is what open_clip gives here for the same PIL image."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import radapter_client
from radapter_client import Client
from radapter_serve.serving.server import TritonServer, free_ports

pytestmark = pytest.mark.triton

LABELS = ["cat, kitty", "a dog in the SNOW", "don't know", "猫"]
ALPHAS = [0.3, 0.8]


@pytest.fixture(scope="module")
def server(exported_tiny_clip: Path) -> Iterator[TritonServer]:
    with TritonServer(exported_tiny_clip / "model_repository", "127.0.0.1", *free_ports()) as server:
        yield server


@pytest.fixture
def client(server: TritonServer, protocol: str) -> Iterator[Client]:
    with Client(server.grpc_url if protocol == "grpc" else server.http_url, batch_size=3) as client:
        yield client


def pictures() -> list[Image.Image]:
    """Of every mode that can be sent, some upright, some wide, some smaller than the model's input."""
    random = np.random.default_rng(0)
    rgba = Image.fromarray(random.integers(0, 256, (70, 41, 4), np.uint8))
    rgb = rgba.convert("RGB")
    modes = [rgb, rgba, rgba.convert("LA"), rgb.convert("L"), rgb.convert("1"), rgb.quantize(200)]
    return [*modes, rgb.transpose(Image.Transpose.ROTATE_90), rgb.resize((20, 9))]


def test_embeds_what_open_clip_embeds(client: Client, exported_tiny_clip: Path):
    merged = sorted(path.parent for path in exported_tiny_clip.glob("merged/**/open_clip_config.json"))[-1]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{merged}")
    model.eval()
    texts = ["", "a photo of a cat.", "word " * 200, "🦊 naïve"][1:]
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(image) for image in pictures()]), normalize=True).numpy()
        words = model.encode_text(tokenize(texts), normalize=True).numpy()
    assert client.release.alpha == ALPHAS[-1]
    np.testing.assert_allclose(client.embed_images(pictures()), images, atol=1e-5)
    np.testing.assert_allclose(client.embed_texts(texts), words, atol=1e-5)


def test_classify(client: Client):
    release = client.release
    named = client.classify(pictures(), label_set="four")
    for one, other in zip(named, client.classify(pictures(), LABELS), strict=True):
        assert sorted(one.labels) == sorted(["cat", "a dog in the SNOW", "don't know", "猫"])
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-3)
        assert sum(one.scores) == pytest.approx(1, abs=1e-5)
    # The same from the embeddings.
    images = client.embed_images(pictures())
    texts = [release.templates[0].format(name) for name in ("cat", "kitty", *LABELS[1:])]
    words = client.embed_texts(texts)
    labels = np.stack([words[:2].mean(0) / np.linalg.norm(words[:2].mean(0)), *words[2:]])
    logits = release.logit_scale * images @ labels.T
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    for result, row in zip(named, scores, strict=True):
        np.testing.assert_allclose(result.scores, np.sort(row)[::-1], rtol=1e-3)


def test_releases(server: TritonServer, client: Client):
    assert [release.alpha for release in client.releases] == ALPHAS
    first, second = client.releases
    assert client.release == second
    assert list(second.label_sets) == ["four"]
    assert second.facts["max_batch_size"] >= 16
    url = str(client._url)
    with Client(url, release=first.version) as pinned:
        assert pinned.is_ready()
        assert pinned.release == first
        assert pinned.classify(pictures()[0], LABELS).release == first.version
        assert not np.allclose(pinned.embed_texts(["a cat"]), client.embed_texts(["a cat"]), atol=1e-3)


def test_ten_thousand_labels(client: Client):
    found = client.classify(pictures()[:2], [f"label {index}" for index in range(10_000)], top_k=2)
    assert [len(result.labels) for result in found] == [2, 2]


def test_profile(client: Client):
    found = client.profile(requests=3)
    assert found.encoder > 0
    assert found.total == pytest.approx(found.network + found.queue + found.task + found.encoder, rel=0.1)


@pytest.mark.parametrize(
    ("image", "labels", "error", "code"),
    [
        (b"not an image", ["a"], "InvalidImage", "invalid_image"),
        ("half", ["a"], "InvalidImage", "invalid_image"),
        ("bomb", ["a"], "InvalidImage", "image_too_large"),
        (b"", ["a"], "InvalidImage", "invalid_image"),
        ("whole", ["a", ""], "InvalidRequest", None),
        ("whole", None, "InvalidRequest", "unknown_label_set"),
    ],
)
def test_bad_input(client: Client, image, labels, error: str, code):
    file = io.BytesIO()
    pictures()[0].save(file, "PNG")
    if image == "bomb":
        file = io.BytesIO()
        Image.new("1", (30_000, 30_000)).save(file, "PNG", compress_level=1)
    whole = file.getvalue()
    data = {"half": whole[:500], "bomb": whole, "whole": whole}.get(image, image)
    with pytest.raises(radapter_client.InvalidRequest) as caught:
        client.classify([pictures()[0], data], labels, label_set=None if labels else "five")
    assert type(caught.value).__name__ == error
    assert code is None or caught.value.code == code
    assert len(str(caught.value).splitlines()) == 1
