"""The client against a real tritonserver with stand-in models: the same over every way, and never a
hang.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import radapter_client
from radapter_client import AsyncClient, Client
from tests.helpers.fake_server import FakeServer

pytestmark = pytest.mark.triton

LABELS = ["a cat", "ein Hündchen", "🦊", "d", "e", "f, g"]


def order(**what: Any) -> bytes:
    """An image that makes the stand-in wait ("sleep") or fail ("error", "bug", "crash")."""
    return json.dumps(what).encode()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout=20, batch_size=4, concurrency=3) as client:
        yield client


def expected(
    image: bytes, labels: list[str], templates: list[str] | None = None
) -> list[tuple[str, float]]:
    """What fake_model.py answers, computed here."""
    suffix = "|".join(templates or []).encode()
    raw = [
        int.from_bytes(hashlib.sha256(image + name.encode() + suffix).digest()[:4], "big")
        for name in labels
    ]
    return sorted(
        zip(labels, (np.array(raw) / sum(raw)).tolist(), strict=True), key=lambda pair: -pair[1]
    )


def vector(data: bytes) -> np.ndarray:
    digest = np.frombuffer(hashlib.sha256(data).digest()[:8], np.uint16).astype(np.float32)
    return digest / np.linalg.norm(digest)


def test_classify_one(client):
    answer = client.classify(b"one", LABELS, top_k=3)
    labels, scores = zip(*expected(b"one", LABELS)[:3], strict=True)
    assert answer.labels == list(labels)
    assert answer.scores == pytest.approx(scores, rel=1e-6)
    assert (answer.top, answer.release) == (labels[0], 2)
    assert len(client.classify(b"one", LABELS).labels) == 5
    assert len(client.classify(b"one", LABELS, top_k=100).labels) == 6
    templates = ["a {}", "b {}"]
    answer = client.classify(b"one", LABELS, templates=templates)
    assert answer.top == expected(b"one", LABELS, templates)[0][0]


def test_many_keep_their_order(client):
    # The first requests of the call are the slowest.
    images = [order(sleep=max(0, 0.2 - index / 50), name=index) for index in range(23)]
    found = client.classify(images, LABELS)
    assert [result.labels for result in found] == [
        [label for label, _ in expected(i, LABELS)[:5]] for i in images
    ]
    texts = [f"text {index} ü" for index in range(50)]
    embeds = client.embed_texts(iter(texts))
    assert (embeds.dtype, embeds.shape, embeds.flags.writeable) == (np.float32, (50, 4), True)
    assert np.array_equal(embeds, np.stack([vector(text.encode()) for text in texts]))
    assert np.array_equal(
        client.embed_images(images), np.stack([vector(image) for image in images])
    )


def test_triton_lists_no_indexes(client):
    with pytest.raises(radapter_client.InvalidRequest, match="this server does not list") as caught:
        client.indexes()
    assert caught.value.code is None


def test_release(client, url: str):
    release = client.release()
    assert (release.version, release.alpha, release.embed_dim) == (2, 1.0, 4)
    assert release.facts["preprocess"] == {"size": 224}
    assert [release.version for release in client.releases()] == [1, 2]
    with Client(url, release=1) as pinned:
        assert (pinned.release().version, pinned.release().alpha) == (1, 0.5)
        assert pinned.is_ready()
        assert {result.release for result in pinned.classify([b"x"] * 40, LABELS)} == {1}
    with Client(url, release=7) as absent:
        assert not absent.is_ready()
        with pytest.raises(radapter_client.ModelNotFound, match="release 7; it serves 1, 2"):
            absent.release()
        with pytest.raises(radapter_client.ModelNotFound, match="version 7 is not found"):
            absent.embed_texts(["x"])


def test_threads_share_a_client(url: str):
    with Client(url, batch_size=2, concurrency=3) as client, ThreadPoolExecutor(8) as threads:

        def work(index: int) -> bool:
            images = [f"{index} {number}".encode() for number in range(7)]
            results = client.classify(images, LABELS)
            tops = [expected(image, LABELS)[0][0] for image in images]
            embeds = np.stack([vector(image) for image in images])
            same = np.array_equal(client.embed_images(images), embeds)
            return same and [result.top for result in results] == tops

        assert all(threads.map(work, range(40)))


def test_tasks_share_a_client(url: str):
    async def main() -> None:
        async with AsyncClient(url, batch_size=2, concurrency=3) as client:
            images = [f"{number}".encode() for number in range(30)]
            answers = await asyncio.gather(*(client.classify(image, LABELS) for image in images))
            assert [answer.top for answer in answers] == [
                expected(image, LABELS)[0][0] for image in images
            ]
            slow = asyncio.ensure_future(client.classify(order(sleep=1), LABELS))
            await asyncio.sleep(0.1)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            assert (await client.classify(b"0", LABELS)).top == answers[0].top

    asyncio.run(main())


def test_server_that_goes_away(fake_repository: Path):
    """Killed in the middle of calls over every way: each fails at once; back again, each client
    works again.
    """
    with FakeServer(fake_repository) as server:
        clients = [Client(url, timeout=60, batch_size=1) for url in server.urls.values()]

        def call(client: Any) -> str:
            try:
                client.classify([b"x", order(sleep=30), b"y"], LABELS)
            except radapter_client.RAdapterClientError as error:
                return type(error).__name__
            return "an answer"

        for client in clients:
            assert client.is_ready()
        start = time.monotonic()
        with ThreadPoolExecutor(len(clients)) as threads:
            calls = [threads.submit(call, client) for client in clients]
            time.sleep(0.5)
            server.signal(signal.SIGKILL)
            assert [found.result() for found in calls] == ["ServerUnavailable"] * len(clients)
        assert time.monotonic() - start < 20
        for client in clients:
            assert not client.is_ready()
            with pytest.raises(radapter_client.ServerUnavailable, match="is the server running"):
                client.embed_texts(["x"])
    with FakeServer(fake_repository, server.ports):
        for client in clients:
            deadline = time.monotonic() + 10
            while not client.is_ready():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert client.embed_texts(["x"]).shape == (1, 4)
            client.close()


def test_server_that_stops(fake_repository: Path):
    """It answers what it has begun, and meanwhile takes its models away: to its clients it is
    unavailable.
    """
    with FakeServer(fake_repository, drain_seconds=4) as server, ThreadPoolExecutor(2) as threads:
        clients = [Client(url, timeout=20) for url in server.urls.values()]

        def ask(client: Any) -> set[str]:
            """What happens until the server is gone."""
            start = time.monotonic()
            seen: set[str] = set()
            gone = re.compile("Failed to connect|refused")
            while time.monotonic() - start < 10 and not any(map(gone.search, seen)):
                for call in (
                    lambda: client.embed_texts(["x"]),
                    lambda: client.embed_texts(["x"] * 40),
                    client.release,
                ):
                    try:
                        call()
                    except Exception as error:
                        seen.add(f"{type(error).__name__}: {error}")
            client.close()
            return seen

        for client in clients:
            client.embed_texts(["x"])
        with Client(server.urls["grpc"], timeout=20) as busy:
            held = threading.Thread(target=lambda: busy.classify(order(sleep=3), LABELS))
            held.start()
            time.sleep(0.3)
            server.signal(signal.SIGTERM)
            for seen in threads.map(ask, clients):
                assert seen and all(error.startswith("ServerUnavailable: ") for error in seen), seen
            held.join()


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
