"""segment and search against a real tritonserver with stand-in models, over every way."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import radapter_client
from radapter_client import Client
from tests.client.test_client_server import Awaited, order
from tests.helpers.fake_server import FakeServer

pytestmark = pytest.mark.triton


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    with request.param(url, timeout=20, concurrency=3) as client:
        yield client


def digest(**inputs: Any) -> float:
    """What fake_model.py makes of the inputs that reached it."""
    state = hashlib.sha256()
    for name, array in inputs.items():
        state.update(f"{name} {array.shape} {array.dtype} {array.tolist()}".encode())
    return float(int.from_bytes(state.digest()[:2], "big"))


def texts(*names: str) -> np.ndarray:
    return np.array([name.encode() for name in names], np.object_)


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def stripes(height: int, width: int, labels: int) -> np.ndarray:
    return np.add.outer(np.arange(height), np.arange(width)) % labels


def test_segment(client):
    found = client.segment(pixels(20, 33), ["Straße", "car", "sky"])
    assert (found.mask.dtype, found.labels, found.release) == (
        np.uint16,
        ["Straße", "car", "sky"],
        2,
    )
    assert np.array_equal(found.mask, stripes(20, 33, 3))
    assert found.scores == [digest(labels=texts("Straße", "car", "sky")), 0, 0]
    assert found.shares == pytest.approx([1 / 3] * 3)
    assert found.background is None
    assert found.overlay(legend=False).size == (33, 20)


def test_segment_sends_every_option(client):
    masks = np.zeros((2, 20, 33), bool)
    masks[0, 3:9] = masks[1, :, 4:] = True
    found = client.segment(
        pixels(20, 33),
        label_set="letters",
        templates=["a {}"],
        threshold=0.25,
        short_side=300,
        stride=10,
        refine=0,
        proposals=masks,
        proposal_scores=[[0.5, 0.25, 0], [0, 1, 0]],
        proposal_weight=1,
    )
    assert (found.labels, found.background) == (["a", "b", "c", "background"], 3)
    assert found.scores[0] == digest(
        label_set=texts("letters"),
        templates=texts("a {}"),
        threshold=np.array([0.25], np.float32),
        short_side=np.array([300], np.int32),
        stride=np.array([10], np.int32),
        refine=np.array([0], np.int32),
        proposals=masks.astype(np.uint8) * 255,
        proposal_scores=np.array([[0.5, 0.25, 0], [0, 1, 0]], np.float32),
        proposal_weight=np.array([1], np.float32),
    )


def test_segment_many(client):
    images = [order(sleep=max(0, 0.2 - index / 20), size=[index + 1, 4]) for index in range(7)]
    found = client.segment(images, ["a", "b"])
    assert [result.mask.shape for result in found] == [(4, index + 1) for index in range(7)]
    assert client.segment([], ["a"]) == []
    masks = [None, np.ones((1, 4, 2))]
    one, other = client.segment(images[:2], ["a", "b"], proposals=masks)
    assert one.scores[0] == digest(labels=texts("a", "b"))
    assert other.scores[0] == digest(
        labels=texts("a", "b"), proposals=np.full((1, 4, 2), 255, np.uint8)
    )


def test_large_mask(client):
    """5,000 x 4,000 pixels, 40 MB: no limit of either protocol stands in the way."""
    found = client.segment(order(size=[5000, 4000]), ["a", "b", "c"])
    assert np.array_equal(found.mask, stripes(4000, 5000, 3))


def test_search(client, tmp_path: Path):
    hits = client.search("a red bicycle", index="photos", top_k=2)
    assert [(hit.id, hit.score, hit.thumbnail) for hit in hits] == [
        ("ordner/bild ü 0.jpg", 1.0, None),
        ("ordner/bild ü 1.jpg", 0.75, None),
    ]
    known = {
        "index": "photos",
        "text": "a red bicycle",
        "rank": 1,
        "outputs": ["id", "metadata", "score"],
    }
    assert hits[1].metadata == known
    (tmp_path / "image.png").write_bytes(b"an image")
    hits = client.search(
        image=tmp_path / "image.png", index="photos", where="year > 2020", thumbnails=True
    )
    assert [hit.thumbnail for hit in hits] == [b"JPEG 0", b"JPEG 1", None]
    assert hits[0].metadata == {
        "index": "photos",
        "image": "an image",
        "where": "year > 2020",
        "rank": 0,
        "outputs": ["id", "metadata", "score", "thumbnail"],
    }


def test_server_without_the_models(fake_repository: Path, tmp_path: Path):
    """A server whose releases are older than the tasks says so; what it has still works."""
    for name in ("embed_image", "embed_text", "classify"):
        shutil.copytree(fake_repository / name, tmp_path / name)
    with FakeServer(tmp_path) as server:
        for url in server.urls.values():
            for kind in (Client, Awaited):
                with kind(url, timeout=20) as client:
                    assert not client.is_ready()
                    with pytest.raises(
                        radapter_client.ModelNotFound, match="no model 'segment'.*radapter-export"
                    ):
                        client.segment(b"x", ["a"])
                    with pytest.raises(
                        radapter_client.ModelNotFound, match="no model 'retrieve'.*radapter-export"
                    ):
                        client.search("x", index="photos")
                    assert client.classify(b"x", ["a"]).top == "a"
