"""An engine through the client: what it answers and what it refuses."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from radapter_client import (
    Client,
    InvalidImage,
    InvalidRequest,
    ModelNotFound,
    RAdapterClientError,
    Request,
    Timeout,
)
from radapter_serve.engine.engine import Engine
from radapter_serve.engine.version import LocalVersion
from radapter_serve.errors import RAdapterError
from radapter_serve.release.served import Served
from radapter_serve.tasks.classify import ClassifyRequest
from radapter_serve.tasks.segment import SegmentRequest
from tests.helpers.small_release import Local, png, seal


@pytest.fixture
def engine(repository: Path):  # type: ignore[no-untyped-def]
    with Engine.open(repository) as engine:
        yield engine


def texts(*values: bytes) -> np.ndarray:
    return np.array([[value] for value in values], object)


def test_answers_are_those_of_the_tasks(repository: Path) -> None:
    Served((1, 2)).save(folder := shutil.copytree(repository, repository.parent / "both"))
    try:
        with Engine.open(folder) as engine, Client(transport=engine) as client:
            assert [one.version for one in client.releases()] == [1, 2]
            assert client.is_ready()
            for number in (1, 2):
                local = Local(folder, number)
                pinned = Client(transport=engine, release=number)
                images = [png(0), png(1, kind="JPEG"), png(2, 60, 61, kind="WEBP")]
                expected = local.embed_images([images])[0].unwrap()
                np.testing.assert_array_equal(pinned.embed_images(images), expected)
                words = ["a cat", "Ölkäfer 猫", "word " * 200]
                expected = local.embed_texts([[word.encode() for word in words]])[0].unwrap()
                np.testing.assert_array_equal(pinned.embed_texts(words), expected)
                labels = ["cat", "dog, hound", "bird"]
                asked = ClassifyRequest(
                    images, [[one.encode() for one in labels]] * 3, top_k=[2] * 3
                )
                answer = local.classify([asked])[0].unwrap()
                for found, names, scores in zip(
                    pinned.classify(images, labels, top_k=2),
                    answer.labels,
                    answer.scores,
                    strict=True,
                ):
                    assert found.labels == names.tolist()
                    np.testing.assert_array_equal(np.array(found.scores, np.float32), scores)
            mask = local.segment(SegmentRequest(png(3), [b"red", b"green"]))
            segmented = client.segment(png(3), ["red", "green"])
            np.testing.assert_array_equal(segmented.mask, mask.mask)
            assert segmented.release == 2
    finally:
        shutil.rmtree(folder)


def test_callers_of_several_threads_get_what_they_asked_for(engine: Engine) -> None:
    client = Client(transport=engine)
    words = [f"word {number}" for number in range(40)]
    alone = client.embed_texts(words)
    found: dict[int, np.ndarray] = {}

    def ask(number: int) -> None:
        found[number] = client.embed_texts([words[number]])[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(words))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    together = np.stack([found[number] for number in range(len(words))])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            "embed_text",
            {"texts": texts(b"a")},
            "no input 'texts'; it has text, alpha",
        ),
        ("embed_text", {"text": np.zeros((1, 1), np.float32)}, "text is FP32; BYTES is taken"),
        ("embed_text", {"text": np.array([b"a"], object)}, r"shape \[1\]; \[-1, 1\] is taken"),
        ("embed_text", {"text": np.empty((0, 1), object)}, r"shape \[0, 1\]"),
        ("embed_text", {"text": texts(*[b"a"] * 65)}, "65 rows in a request; at most 64"),
        ("embed_text", {}, "the input text is missing"),
        ("embed_text", {"text": texts(b"\xff")}, "UTF-8"),
        (
            "classify",
            {"image": texts(png(0)), "labels": np.array([[b"a"], [b"b"]], object)},
            r"as many rows; these have \[1, 2\]",
        ),
        ("segment", {"image": texts(png(0))}, r"image has shape \[1, 1\]; \[1\] is taken"),
    ],
)
def test_bad_requests(
    engine: Engine, model: str, inputs: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        engine.send(Request("infer", model, inputs=inputs), 10)


def test_what_is_not_served(engine: Engine) -> None:
    client = Client(transport=engine)
    with pytest.raises(ModelNotFound, match="no release 99 of embed_text here; there are 1, 2"):
        Client(transport=engine, release=99).embed_texts(["a"])
    with pytest.raises(ModelNotFound, match="there is no task 'image_encoder'; there are"):
        engine.send(Request("infer", "image_encoder"), 10)
    with pytest.raises(InvalidImage, match="not an image"):
        client.classify(b"x", ["a"])
    with pytest.raises(InvalidRequest, match="no index 'photos'"):
        client.search("a", index="photos")


def test_one_output_alone(engine: Engine) -> None:
    inputs = {"image": texts(png(0)), "labels": np.array([[b"a", b"b"]], object)}
    reply = engine.send(Request("infer", "classify", inputs=inputs, outputs=["score"]), 10)
    assert set(reply.outputs) == {"score"} and reply.version == 2


@pytest.mark.parametrize(("own", "of_all"), [(0.001, 60.0), (60.0, 0.001)])
def test_nobody_waits_longer_than_they_said_or_than_is_allowed(
    repository: Path, own: float, of_all: float
) -> None:
    labels = np.array([[f"label {number}".encode() for number in range(2000)]], object)
    inputs = {"image": texts(png(0)), "labels": labels}
    version = LocalVersion(repository, 2, Path("indexes"))
    with Engine([version], max_seconds=of_all) as engine, pytest.raises(Timeout):
        engine.send(Request("infer", "classify", inputs=inputs), own)


def test_a_closed_engine_says_so(repository: Path) -> None:
    before = set(threading.enumerate())
    engine = Engine.open(repository)
    client = Client(transport=engine)
    client.embed_images([png(0), png(1)])
    client.close()
    with pytest.raises(RAdapterClientError, match="closed"):
        client.embed_texts(["a"])
    with pytest.raises(RAdapterClientError, match="the model is closed"):
        engine.send(Request("infer", "embed_text", inputs={"text": texts(b"a")}), 10)
    assert not [one for one in set(threading.enumerate()) - before if one.is_alive()]


def test_broken_releases(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match="no release in the model repository"):
        Engine.open(tmp_path)
    copy = shutil.copytree(repository, tmp_path / "copy")
    with pytest.raises(RAdapterError, match="no release 7 in"):
        Engine.open(f"{copy}@7")
    (copy / "image_encoder" / "2" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(RAdapterError, match=r"image_encoder/2/model.onnx"):
        Engine.open(copy)
    seal(copy, 2)  # as if it had been exported so
    with pytest.raises(RAdapterError, match=r"cannot load .*image_encoder.2.model.onnx"):
        Engine.open(copy)
    with Engine.open(f"{copy}@1") as engine:
        assert engine.versions() == [1]
