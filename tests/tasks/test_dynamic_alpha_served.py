"""A release that takes any α, served: each request's answer is that of the release with its α
folded in.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radapter_client import Client
from radapter_serve.contract.labels import split_label
from radapter_serve.encoders.loaded import LoadedRelease, load_release, served_release
from radapter_serve.index.build import build
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import post

pytestmark = pytest.mark.triton

LABELS = ["cat, kitty", "a dog in the SNOW", "don't know", "猫"]
FIXED = {0.3: 1, 0.8: 2}  # α of the releases of `exported_tiny_clip`


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (33, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indexes")


@pytest.fixture(scope="module")
def server(dynamic_tiny_clip: Path, indexes: Path) -> Iterator[TritonServer]:
    with TritonServer(
        ServerConfig(dynamic_tiny_clip, Endpoints.on_free_ports(), indexes=indexes)
    ) as server:
        yield server


@pytest.fixture
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url, batch_size=3) as client:
        yield client


@pytest.fixture(scope="module")
def fixed(exported_tiny_clip: Path) -> dict[float, LoadedRelease]:
    repository = exported_tiny_clip / "model_repository"
    return {alpha: load_release(f"{repository}@{version}") for alpha, version in FIXED.items()}


def files(photos: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(photos.iterdir())]


def scores(release: LoadedRelease, image: bytes) -> dict[str, float]:
    """By the formula, with the fixed release's embeddings."""
    template = release.release.templates[0]
    texts = [
        release.embed_texts([template.format(name) for name in split_label(line)]).mean(0)
        for line in LABELS
    ]
    labels = np.stack([text / np.linalg.norm(text) for text in texts])
    logits = release.release.logit_scale * labels @ release.embed_pixels([release.pixels(image)])[0]
    shares = np.exp(logits - logits.max())
    return dict(
        zip(
            [split_label(line)[0] for line in LABELS], (shares / shares.sum()).tolist(), strict=True
        )
    )


def test_embeddings(client: Client, photos: Path, fixed: dict[float, LoadedRelease]) -> None:
    assert (client.release().alpha, client.release().dynamic_alpha) == (0.5, True)
    for alpha, release in fixed.items():
        pixels = [release.pixels(data) for data in files(photos)]
        found = client.embed_images(files(photos), alpha=alpha)
        np.testing.assert_allclose(found, release.embed_pixels(pixels), atol=1e-5)
        found = client.embed_texts(["a cat", "two dogs"], alpha=alpha)
        np.testing.assert_allclose(found, release.embed_texts(["a cat", "two dogs"]), atol=1e-5)
    own = client.embed_texts(["a cat"])
    np.testing.assert_array_equal(own, client.embed_texts(["a cat"], alpha=0.5))
    assert np.abs(own - client.embed_texts(["a cat"], alpha=0)).max() > 1e-3


def test_classify_at_many_alphas_at_once(
    client: Client, photos: Path, fixed: dict[float, LoadedRelease]
) -> None:
    jobs = [
        (image, alpha, named)
        for image in files(photos)[:2]
        for alpha in FIXED
        for named in (True, False)
    ] * 3

    def call(job: tuple[bytes, float, bool]) -> dict[str, float]:
        image, alpha, named = job
        given = {"label_set": "four"} if named else {"labels": LABELS}
        found = client.classify(image, alpha=alpha, **given)
        return dict(zip(found.labels, found.scores, strict=True))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, jobs))
    for (image, alpha, _), result in zip(jobs, results, strict=True):
        assert result == pytest.approx(scores(fixed[alpha], image), rel=1e-3)


def test_segment(client: Client, photos: Path, fixed: dict[float, LoadedRelease]) -> None:
    """A mask of the whole of a square image is that image."""
    image = files(photos)[0]
    for alpha, release in fixed.items():
        expected = scores(release, image)
        found = client.segment(image, LABELS, proposals=np.ones((1, 33, 33), bool), alpha=alpha)
        best = found.labels[int(found.mask[0, 0])]
        assert found.scores[found.labels.index(best)] == pytest.approx(
            max(expected.values()), rel=1e-3
        )


def test_search_asks_at_the_alpha_of_the_index(
    server: TritonServer,
    client: Client,
    photos: Path,
    indexes: Path,
    fixed: dict[float, LoadedRelease],
) -> None:
    release = served_release(server.grpc_url)
    build(str(photos), indexes / "photos", release.at(0.8))
    release.close()
    hits = client.search("a cat", index="photos")
    one = fixed[0.8]
    for hit in hits:
        image = one.embed_pixels([one.pixels((photos / hit.id).read_bytes())])[0]
        assert hit.score == pytest.approx(float(image @ one.embed_texts(["a cat"])[0]), abs=1e-5)


def test_json_and_the_servers_own_check(
    server: TritonServer, fixed: dict[float, LoadedRelease]
) -> None:
    def body(alpha: float) -> dict[str, object]:
        text = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a cat"]}
        return {
            "inputs": [
                text,
                {"name": "alpha", "shape": [1, 1], "datatype": "FP32", "data": [alpha]},
            ]
        }

    status, answer = post(server, "models/embed_text/infer", body(0.3))
    assert status == 200
    np.testing.assert_allclose(
        answer["outputs"][0]["data"], fixed[0.3].embed_texts(["a cat"])[0], atol=1e-5
    )
    status, answer = post(server, "models/embed_text/infer", body(7))
    assert status == 400 and "[invalid_argument] alpha is 7; allowed: 0" in answer["error"]
